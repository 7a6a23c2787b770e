//! Blocks of headers: names and values with 32-bit lengths, in one zlib stream per direction and connection, with a
//! dictionary that the protocol fixes (draft-mbelshe-httpbis-spdy-00, section 2.6.10).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::SpdyError;

/// A block may have this many bytes uncompressed.
pub const LIMIT: usize = 16 * 1024;

/// Words of the dictionary that have a 32-bit length before them.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

/// The rest of it.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,\
    publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS {
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TEXT.as_bytes());
    bytes
}

/// Headers of a stream, in the order they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of `name` (lower case).
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut headers = self.0.iter();
        headers
            .find(|header| header.0 == name)
            .map(|header| header.1.as_str())
    }

    fn parse(mut block: &[u8]) -> Result<Self, SpdyError> {
        let count = number(&mut block)?;
        let mut headers = Vec::new();
        // Each takes eight bytes at least, and the block is bounded.
        for _ in 0..count {
            headers.push((text(&mut block)?.to_ascii_lowercase(), text(&mut block)?));
        }
        Ok(Self(headers))
    }
}

fn number(block: &mut &[u8]) -> Result<u32, SpdyError> {
    let (first, rest) = block
        .split_first_chunk()
        .ok_or(SpdyError::Headers("cut short"))?;
    *block = rest;
    Ok(u32::from_be_bytes(*first))
}

fn text(block: &mut &[u8]) -> Result<String, SpdyError> {
    let length = number(block)? as usize;
    let (first, rest) = block
        .split_at_checked(length)
        .ok_or(SpdyError::Headers("cut short"))?;
    *block = rest;
    String::from_utf8(first.to_vec()).map_err(|_| SpdyError::Headers("not text"))
}

/// Uncompresses the blocks of one direction of a connection, all of them and in order.
#[derive(Debug)]
pub struct Reader(Decompress);

impl Default for Reader {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Reader {
    /// The headers in a block.
    ///
    /// # Errors
    /// Not zlib, more than [`LIMIT`] bytes, not what a block of headers is. No block after it can be read.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        Headers::parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let begin = self.0.total_in();
        let mut output = Vec::with_capacity(512);
        loop {
            let consumed = (self.0.total_in() - begin) as usize;
            let result =
                self.0
                    .decompress_vec(&block[consumed..], &mut output, FlushDecompress::Sync);
            match result {
                Ok(Status::StreamEnd) => return Err(SpdyError::Headers("the compression ends")),
                Ok(Status::Ok | Status::BufError) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.0.set_dictionary(&dictionary());
                    set.map_err(|_| SpdyError::Headers("another dictionary"))?;
                    continue;
                }
                Err(_) => return Err(SpdyError::Headers("not compressed")),
            }
            if output.len() > LIMIT {
                return Err(SpdyError::Headers("too long"));
            }
            if output.len() < output.capacity() {
                // There was room for more: that was all of it.
                return Ok(output);
            }
            output.reserve(output.capacity());
        }
    }
}

/// Compresses the blocks of one direction of a connection.
#[derive(Debug)]
pub struct Writer(Compress);

impl Default for Writer {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        // Fails only in a stream that has begun.
        let _ = compress.set_dictionary(&dictionary());
        Self(compress)
    }
}

impl Writer {
    /// The block of `headers`.
    pub fn write(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        block.extend_from_slice(&(headers.len() as u32).to_be_bytes());
        for (name, value) in headers {
            for text in [name, value] {
                block.extend_from_slice(&(text.len() as u32).to_be_bytes());
                block.extend_from_slice(text.as_bytes());
            }
        }
        self.deflate(&block)
    }

    fn deflate(&mut self, block: &[u8]) -> Vec<u8> {
        let begin = self.0.total_in();
        let mut output = Vec::with_capacity(block.len() + 64);
        loop {
            let consumed = (self.0.total_in() - begin) as usize;
            // Compression of a buffer in memory has no errors (zlib's manual: only those of a wrong state).
            let _ = self
                .0
                .compress_vec(&block[consumed..], &mut output, FlushCompress::Sync);
            if output.len() < output.capacity() {
                return output;
            }
            output.reserve(64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dictionary_is_the_protocols() {
        let dictionary = dictionary();
        assert_eq!(dictionary.len(), 1423);
        // zlib names a dictionary by this sum; every SPDY/3 client has it in the first block's first bytes.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in dictionary {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn bombs_are_refused() {
        let mut writer = Writer::default();
        let bomb = writer.write(&[("a", &"x".repeat(1 << 20))]);
        assert!(bomb.len() < LIMIT);
        assert!(Reader::default().read(&bomb).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(blocks in prop::collection::vec(
            prop::collection::vec(("[a-z]{0,9}", "[ -~]{0,300}"), 0..9), 1..6))
        {
            let (mut writer, mut reader) = (Writer::default(), Reader::default());
            for block in blocks {
                let pairs: Vec<_> = block.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
                prop_assert_eq!(reader.read(&writer.write(&pairs)).unwrap().0, block);
            }
        }

        #[test]
        fn nonsense_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::default();
            let _ = reader.read(&bytes);
            let _ = reader.read(&bytes);
            let _ = Headers::parse(&bytes);
        }
    }
}
