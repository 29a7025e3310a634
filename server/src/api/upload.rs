//! UploadMedia: a header, then the file in chunks.

use std::sync::Arc;

use bytes::Bytes;
use lockstep_proto::v1;
use lockstep_proto::v1::upload_media_request::Piece;
use tonic::{Status, Streaming};

use super::caller::Caller;
use super::convert::check_salt;
use super::fault::{Faults, Refusal};
use crate::budget;
use crate::deadline::Phase;
use crate::generation::Frontend;
use crate::limits::MAX_UPLOAD_BYTES;
use crate::media::{MediaId, MediaKind, MediaLibrary};
use crate::request::Namespace;
use crate::workers::{Workers, WorkersError};

/// Uploads whose bytes are hashed at once.
const HASHING_AT_ONCE: usize = 2;
/// Uploads that may wait to be hashed.
const WAITING_TO_HASH: usize = 256;

/// What an upload holds, checked.
struct Header {
    kind: MediaKind,
    size_bytes: u64,
    namespace: Namespace,
}

/// Where uploads go.
#[derive(Debug)]
pub struct Uploads {
    library: Arc<MediaLibrary>,
    workers: Workers,
}

impl Uploads {
    /// Uploads to a library.
    pub fn new(library: Arc<MediaLibrary>) -> Self {
        Self { library, workers: Workers::new("hashing uploads", HASHING_AT_ONCE, WAITING_TO_HASH) }
    }

    /// Takes an upload, checks that its file begins as a medium of its kind does, and keeps it.
    ///
    /// # Errors
    /// A header that breaks a rule, another number of bytes than it says, a file that is no medium, no room now, the deadline.
    pub async fn take(
        &self,
        mut pieces: Streaming<v1::UploadMediaRequest>,
        caller: &Caller,
        frontend: &Frontend,
    ) -> Result<MediaId, Status> {
        let max_picture_bytes = frontend.media.pictures.limits().max_file_bytes as u64;
        let header = match next(&mut pieces).await? {
            Some(Piece::Header(header)) => check(header, caller, &self.library, max_picture_bytes)?,
            _ => return Err(Refusal::field("header", "must come first").into()),
        };
        let Header { kind, size_bytes, namespace } = header;
        let file = receive(&mut pieces, size_bytes, caller).await?;
        let stored = self.store(kind, namespace, file, caller, frontend);
        let stored = caller.deadline.bound(Phase::Media, stored).await.map_err(Refusal::from)?;
        Ok(stored?)
    }

    async fn store(
        &self,
        kind: MediaKind,
        namespace: Namespace,
        file: Bytes,
        caller: &Caller,
        frontend: &Frontend,
    ) -> Result<MediaId, Refusal> {
        frontend.check_upload(kind, budget::held(file.clone(), caller.message.clone())).await?;
        // Work that goes on after the deadline holds its bytes until its end.
        let (library, message) = (self.library.clone(), caller.message.clone());
        let kept = self.workers.run(move || {
            let _message = message;
            let id = MediaId::of(&file);
            library.insert(namespace, kind, id, file).map(|()| id)
        });
        let kept = kept.await.map_err(|error| match error {
            WorkersError::Overloaded { .. } => Refusal::Exhausted(error.to_string()),
            WorkersError::Panicked { .. } => Refusal::Internal(error.to_string()),
        })?;
        kept.map_err(|error| Refusal::field("header.size_bytes", error.to_string()))
    }
}

async fn next(pieces: &mut Streaming<v1::UploadMediaRequest>) -> Result<Option<Piece>, Status> {
    match pieces.message().await? {
        None => Ok(None),
        Some(v1::UploadMediaRequest { piece: Some(piece) }) => Ok(Some(piece)),
        Some(v1::UploadMediaRequest { piece: None }) => {
            Err(Refusal::field("piece", "must be a header or a chunk").into())
        }
    }
}

fn check(
    header: v1::UploadHeader,
    caller: &Caller,
    library: &MediaLibrary,
    max_picture_bytes: u64,
) -> Result<Header, Refusal> {
    let mut faults = Faults::default();
    let kind = match header.kind() {
        v1::MediaKind::Image => MediaKind::Image,
        v1::MediaKind::Video => MediaKind::Video,
        v1::MediaKind::Unspecified => {
            faults.invalid("header.kind", "must be MEDIA_KIND_IMAGE or MEDIA_KIND_VIDEO");
            MediaKind::Image
        }
    };
    let size_bytes = header.size_bytes;
    let most = if kind == MediaKind::Image { max_picture_bytes } else { MAX_UPLOAD_BYTES };
    match size_bytes {
        0 => faults.invalid("header.size_bytes", "must be at least 1"),
        _ if size_bytes > most => {
            faults.invalid("header.size_bytes", format!("is {size_bytes}; at most {most}"));
        }
        _ => {
            if let Err(error) = library.check(size_bytes) {
                faults.invalid("header.size_bytes", error.to_string());
            }
        }
    }
    let salt = header.cache_salt.as_deref();
    check_salt("header.cache_salt", salt, &mut faults);
    faults.into_result()?;
    Ok(Header { kind, size_bytes, namespace: caller.namespace(salt) })
}

/// The file. A chunk is a piece of the message that it came in, so that it is copied and let go at once.
async fn receive(
    pieces: &mut Streaming<v1::UploadMediaRequest>,
    size_bytes: u64,
    caller: &Caller,
) -> Result<Bytes, Status> {
    let mut file = Vec::new();
    while let Some(piece) = next(pieces).await? {
        let Piece::Chunk(chunk) = piece else {
            return Err(Refusal::field("header", "came a second time").into());
        };
        // It is counted a second time: what it came in is held until the upload's end, as far as the budget knows.
        let room = caller.message.grow(chunk.len() as u64);
        room.map_err(|error| Refusal::over_budget("header.size_bytes", error))?;
        let left = size_bytes as usize - file.len();
        if chunk.len() > left {
            let why = format!("is {size_bytes}, but more bytes came");
            return Err(Refusal::field("header.size_bytes", why).into());
        }
        // Room grows by doubling, but never beyond the file: a header alone takes no memory.
        file.reserve_exact(file.len().min(left).max(chunk.len()));
        file.extend_from_slice(&chunk);
    }
    if (file.len() as u64) < size_bytes {
        let why = format!("is {size_bytes}, but {} bytes came", file.len());
        return Err(Refusal::field("header.size_bytes", why).into());
    }
    Ok(file.into())
}
