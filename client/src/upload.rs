//! Media by their ids: uploaded when the server does not have them, and again when it has them no more.

use std::{
    collections::HashSet,
    fmt,
    future::Future,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream;
use lockstep_proto::v1::{self, upload_media_request::Piece};
use tonic::Code;

use crate::{Client, Error, MediaKind, Request, client::bounded};
#[cfg(doc)]
use crate::{Image, Video};

/// Bytes of one message of an upload.
const CHUNK_BYTES: usize = 1 << 20;

/// What a medium is called after it was uploaded: the BLAKE3 hash of its file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MediaId([u8; 32]);

impl MediaId {
    /// The id of a file.
    pub fn of(file: &[u8]) -> Self {
        MediaId(blake3::hash(file).into())
    }

    pub(crate) fn to_wire(self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

impl fmt::Debug for MediaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MediaId({})", blake3::Hash::from(self.0).to_hex())
    }
}

impl Client {
    /// Uploads the file of a picture or video, for requests with this salt that send it by its id ([`Image::by_id`],
    /// [`Video::by_id`]). There is no need to call this: such a request uploads what the server does not have by itself.
    pub async fn upload(
        &self,
        kind: MediaKind,
        file: impl Into<Bytes>,
        cache_salt: Option<&str>,
    ) -> Result<MediaId, Error> {
        let deadline = self.own_timeout().map(|timeout| Instant::now() + timeout);
        let kind = match kind {
            MediaKind::Image => v1::MediaKind::Image,
            MediaKind::Video => v1::MediaKind::Video,
        };
        self.upload_until((kind, &file.into()), cache_salt, deadline).await
    }

    async fn upload_until(
        &self,
        (kind, file): (v1::MediaKind, &Bytes),
        cache_salt: Option<&str>,
        deadline: Option<Instant>,
    ) -> Result<MediaId, Error> {
        let file = file.clone();
        let header = v1::UploadHeader {
            kind: kind.into(),
            size_bytes: file.len() as u64,
            cache_salt: cache_salt.map(str::to_owned),
        };
        let size_bytes = file.len();
        let chunks = (0..size_bytes).step_by(CHUNK_BYTES);
        let chunks = chunks.map(move |at| file.slice(at..size_bytes.min(at + CHUNK_BYTES))).map(Piece::Chunk);
        let pieces = [Piece::Header(header)].into_iter().chain(chunks);
        let pieces = pieces.map(|piece| v1::UploadMediaRequest { piece: Some(piece) });
        let mut request = tonic::Request::new(stream::iter(pieces));
        if let Some(deadline) = deadline {
            request.set_timeout(
                deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)),
            );
        }
        let mut service = self.service();
        let told = bounded(service.upload_media(request), deadline).await?.media_id;
        let told = told.as_ref().try_into().map(MediaId);
        told.map_err(|_| Error::Protocol("the id of an uploaded medium has not 32 bytes".to_owned()))
    }

    /// Makes a call, and makes it again if it was refused only because the server lacks pictures of `request`, which are
    /// uploaded before, each once: a server that lets go of one for another will not have all of them.
    pub(crate) async fn with_media<T, F>(
        &self,
        request: &Request,
        deadline: Option<Instant>,
        call: impl Fn() -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut uploaded = HashSet::new();
        loop {
            let error = match call().await {
                Err(error) if error.code() == Some(Code::NotFound) => error,
                result => return result,
            };
            // A medium that stands at several places is one, and so are its clones.
            let is_new = |(kind, file): &(v1::MediaKind, &Bytes)| {
                uploaded.insert((*kind, file.as_ptr() as usize, file.len()))
            };
            let missing: Vec<_> = request.files_by_id(error.violations()).filter(is_new).collect();
            if missing.is_empty() {
                return Err(error);
            }
            for medium in missing {
                self.upload_until(medium, request.salt(), deadline).await?;
            }
        }
    }
}
