//! The codec of both packages' services: requests are measured before they are decoded.

use std::marker::PhantomData;

use prost::bytes::Buf;
use prost::encoding::decode_varint;
use prost::{Message, Name};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

include!(concat!(env!("OUT_DIR"), "/fields.rs"));

/// Fields that a request of the public API may have, those of the messages in it included. A field of two bytes on the wire
/// takes a hundred in memory, so that a bound on bytes alone is none.
pub const MAX_REQUEST_FIELDS: usize = 1 << 20;
/// How deep messages may lie in each other; prost's own bound.
const MAX_DEPTH: usize = 100;

/// A field of a message.
struct Field {
    number: u32,
    name: &'static str,
    kind: Kind,
}

/// What a field is, as far as it matters to how much memory it takes.
enum Kind {
    /// A message of this type.
    Message(&'static str),
    /// Numbers, several of which may be one field on the wire.
    Numbers,
    /// Anything else.
    Other,
}

/// Protobuf, with a bound on the fields of requests to the public API.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// Decodes messages of one type.
#[derive(Debug)]
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: Message + Name + Default> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    /// # Errors
    /// INVALID_ARGUMENT, with the name of the field where that is known, if there are too many fields or the bytes are no such
    /// message.
    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let message = buf.copy_to_bytes(buf.remaining());
        if U::PACKAGE == "lockstep.v1" && U::NAME.ends_with("Request") {
            let mut walk = Walk { left: MAX_REQUEST_FIELDS, path: Vec::new() };
            walk.message(&U::full_name(), &message).map_err(|TooMany| {
                let path = walk.path.join(".");
                Status::invalid_argument(format!(
                    "{path}: with it the message has more than {MAX_REQUEST_FIELDS} fields"
                ))
            })?;
        }
        let decoded = U::decode(message);
        decoded.map(Some).map_err(|error| Status::invalid_argument(format!("not a {}: {error}", U::NAME)))
    }
}

/// More fields than there may be.
struct TooMany;

/// A walk over an encoded message, which takes time in proportion to its fields, not to its bytes.
struct Walk {
    /// How many more fields there may be.
    left: usize,
    /// Names of the fields that lie around what is looked at.
    path: Vec<&'static str>,
}

impl Walk {
    /// Counts the fields of a message. What is no message is left to be found by decoding.
    fn message(&mut self, kind: &str, mut rest: &[u8]) -> Result<(), TooMany> {
        let known = FIELDS.binary_search_by_key(&kind, |(kind, _)| kind).map_or(&[][..], |at| FIELDS[at].1);
        while let Ok(tag) = decode_varint(&mut rest) {
            let field = known.iter().find(|field| u64::from(field.number) == tag >> 3);
            self.path.extend(field.map(|field| field.name));
            self.take(1)?;
            let length = match tag & 7 {
                0 => decode_varint(&mut rest).map_or(rest.len(), |_| 0),
                1 => 8,
                2 => decode_varint(&mut rest).map_or(usize::MAX, |length| length as usize),
                5 => 4,
                _ => 0,
            };
            let Some((value, after)) = rest.split_at_checked(length) else { break };
            rest = after;
            match field.map(|field| &field.kind) {
                Some(Kind::Message(kind)) if tag & 7 == 2 && self.path.len() < MAX_DEPTH => {
                    self.message(kind, value)?
                }
                // A number takes a byte or more.
                Some(Kind::Numbers) if tag & 7 == 2 => self.take(value.len())?,
                _ => {}
            }
            self.path.truncate(self.path.len() - usize::from(field.is_some()));
        }
        Ok(())
    }

    fn take(&mut self, fields: usize) -> Result<(), TooMany> {
        self.left = self.left.checked_sub(fields).ok_or(TooMany)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    fn walked(message: &impl Name, most: usize) -> Result<usize, String> {
        let mut walk = Walk { left: most, path: Vec::new() };
        match walk.message(&full_name(message), &message.encode_to_vec()) {
            Ok(()) => Ok(most - walk.left),
            Err(TooMany) => Err(walk.path.join(".")),
        }
    }

    fn full_name<M: Name>(_: &M) -> String {
        M::full_name()
    }

    fn chat(num_parts: usize) -> v1::GenerateRequest {
        let text = v1::Part { part: Some(v1::part::Part::Text("x".repeat(1000))) };
        let message = v1::Message { role: 2, parts: vec![text; num_parts] };
        let chat = v1::Chat { messages: vec![message.clone(), message], tools: vec![] };
        v1::GenerateRequest { chat: Some(chat), ..Default::default() }
    }

    #[test]
    fn fields_are_counted_wherever_they_lie() {
        // The chat, and of each of two messages itself, its role, and of each part itself and its text.
        assert_eq!(walked(&chat(10), 1000), Ok(1 + 2 * (2 + 10 * 2)));
        let inner = v1::StreamGenerateRequest { request: Some(chat(10)) };
        assert_eq!(walked(&inner, 1000), Ok(1 + 1 + 2 * (2 + 10 * 2)));
        let stopping =
            v1::Stopping { stop: vec!["a".into(); 5], stop_token_ids: vec![1, 300], ..Default::default() };
        let request = v1::GenerateRequest { stopping: Some(stopping), ..Default::default() };
        assert_eq!(walked(&request, 1000), Ok(1 + 5 + 1 + 3));
    }

    #[test]
    fn too_many_are_named() {
        assert_eq!(walked(&chat(10), 45), Ok(45));
        assert_eq!(walked(&chat(10), 44), Err("chat.messages.parts.text".into()));
        assert_eq!(walked(&chat(10), 3), Err("chat.messages.parts".into()));
    }

    #[test]
    fn what_is_no_message_is_walked_to_its_end() {
        let whole = chat(3).encode_to_vec();
        for end in 0..whole.len() {
            let mut walk = Walk { left: 1000, path: Vec::new() };
            assert!(walk.message("lockstep.v1.GenerateRequest", &whole[..end]).is_ok(), "{end}");
        }
        for byte in 0..=u8::MAX {
            let mut walk = Walk { left: 1000, path: Vec::new() };
            assert!(walk.message("lockstep.v1.GenerateRequest", &[byte; 60]).is_ok(), "{byte}");
        }
    }
}
