//! What the pod's containers use, as far as it is believed: numbers are the guest's word, but of which containers, and of
//! how many interfaces and devices, is not.

use std::collections::HashSet;

use podvisor_proto::agent::SampleResponse;

use super::{Pod, PodError};
use crate::text;

/// More are cut off.
const INTERFACES: usize = 16;
const DEVICES: usize = 16;
/// Linux `IFNAMSIZ`, without its end.
const INTERFACE_NAME: usize = 15;

impl Pod {
    /// What its containers use now.
    pub async fn sample(&self) -> Result<SampleResponse, PodError> {
        let mut sample = self.ready_runner()?.sample().await?;
        let ids: HashSet<String> = self.containers().keys().cloned().collect();
        restrict(&mut sample, ids);
        Ok(sample)
    }
}

/// Takes away what is not of the containers `ids`, what is there twice, and what is too much.
fn restrict(sample: &mut SampleResponse, mut ids: HashSet<String>) {
    sample
        .containers
        .retain(|container| ids.remove(&container.id));
    sample.containers.shrink_to_fit();
    sample.interfaces.truncate(INTERFACES);
    for interface in &mut sample.interfaces {
        interface.name = text::from_guest(&interface.name, INTERFACE_NAME);
    }
    let containers = sample.containers.iter_mut();
    let of_containers = containers.filter_map(|container| container.usage.as_deref_mut());
    for usage in of_containers.chain(&mut sample.total) {
        usage.io.truncate(DEVICES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podvisor_proto::agent::{ContainerSample, DeviceIo, InterfaceSample, Usage};

    #[test]
    fn what_the_guest_makes_up_is_taken_away() {
        let usage = Usage {
            io: vec![DeviceIo::default(); 1000],
            ..Usage::default()
        };
        let container = |id: &str| ContainerSample {
            id: id.to_owned(),
            usage: Some(usage.clone().into()),
            ..ContainerSample::default()
        };
        let interface = InterfaceSample {
            name: "\x1b[31m".repeat(100),
            ..InterfaceSample::default()
        };
        let mut sample = SampleResponse {
            containers: ["a", "another pod's", "b", "a"].map(container).to_vec(),
            interfaces: vec![interface; 1000],
            total: Some(usage.clone()),
            scratch: None,
        };
        let ids = ["a", "b", "c"].map(str::to_owned);
        restrict(&mut sample, ids.into_iter().collect());
        let ids: Vec<_> = sample.containers.iter().map(|c| c.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(
            sample.containers[1].usage.as_ref().unwrap().io.len(),
            DEVICES
        );
        assert_eq!(sample.total.unwrap().io.len(), DEVICES);
        assert_eq!(sample.interfaces.len(), INTERFACES);
        assert!(sample.interfaces[0].name.len() <= INTERFACE_NAME);
        assert!(!sample.interfaces[0].name.contains('\x1b'));
    }
}
