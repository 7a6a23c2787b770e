//! Answers that are lists, for servers that have most of each item encoded already.

use prost::DecodeError;
use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes};
use prost::encoding::{self, DecodeContext, WireType};

/// Of `items`, in all messages that are this.
const ITEMS: u32 = 1;

/// A message that has nothing but items, `repeated T items = 1`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct List<T> {
    /// What a client gets.
    pub items: Vec<T>,
    /// What a server may give besides.
    pub encoded: Vec<Encoded<T>>,
}

/// An item of which most is encoded already. The fields of an encoded message may come in any order, also in two parts
/// (protobuf's encoding, "Last One Wins").
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded<T> {
    /// What does not change.
    pub fixed: Bytes,
    /// The other fields.
    pub rest: T,
}

impl<T: Message> Encoded<T> {
    fn encoded_len(&self) -> usize {
        self.fixed.len() + self.rest.encoded_len()
    }
}

impl<T: Message + Default> Message for List<T> {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        encoding::message::encode_repeated(ITEMS, &self.items, buffer);
        for item in &self.encoded {
            encoding::encode_key(ITEMS, WireType::LengthDelimited, buffer);
            encoding::encode_varint(item.encoded_len() as u64, buffer);
            buffer.put_slice(&item.fixed);
            item.rest.encode_raw(buffer);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            ITEMS => encoding::message::merge_repeated(wire_type, &mut self.items, buffer, context),
            _ => encoding::skip_field(wire_type, tag, buffer, context),
        }
    }

    fn encoded_len(&self) -> usize {
        let encoded = self.encoded.iter().map(|item| {
            let length = item.encoded_len();
            encoding::key_len(ITEMS) + encoding::encoded_len_varint(length as u64) + length
        });
        encoding::message::encoded_len_repeated(ITEMS, &self.items) + encoded.sum::<usize>()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::{Container, ContainerState, ListContainersResponse};

    #[test]
    fn a_client_gets_whole_items_in_their_order() {
        let whole = |id: &str| Container {
            id: id.into(),
            state: ContainerState::ContainerRunning as i32,
            labels: [("app".into(), "web".into())].into(),
            ..Container::default()
        };
        let encoded = |id: &str| Encoded {
            fixed: Container {
                state: 0,
                ..whole(id)
            }
            .encode_to_vec()
            .into(),
            rest: Container {
                state: ContainerState::ContainerRunning as i32,
                ..Container::default()
            },
        };
        let given = ListContainersResponse {
            items: vec![whole("a")],
            encoded: vec![encoded("b"), Encoded::default(), encoded("c")],
        };
        let bytes = given.encode_to_vec();
        assert_eq!(bytes.len(), given.encoded_len());
        let got = ListContainersResponse::decode(bytes.as_slice()).unwrap();
        let wanted = [whole("a"), whole("b"), Container::default(), whole("c")];
        assert_eq!(got.items, wanted);
        assert!(got.encoded.is_empty());
    }
}
