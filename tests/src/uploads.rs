//! Uploads, piece by piece.

use lockstep_proto::v1;
use lockstep_proto::v1::upload_media_request::Piece;
use tonic::Status;

use crate::beside::Service;

/// Bytes of uploaded files that a server of the tests keeps: `coffee.jpg`, the largest picture of the tests, alone.
pub const LIBRARY_BYTES: usize = 58_000;

/// What comes first.
pub fn header(kind: v1::MediaKind, size_bytes: usize, cache_salt: Option<&str>) -> v1::UploadMediaRequest {
    let size_bytes = size_bytes as u64;
    let cache_salt = cache_salt.map(str::to_owned);
    let piece = Piece::Header(v1::UploadHeader { kind: kind.into(), size_bytes, cache_salt });
    v1::UploadMediaRequest { piece: Some(piece) }
}

/// Some bytes of the file.
pub fn chunk(bytes: &[u8]) -> v1::UploadMediaRequest {
    v1::UploadMediaRequest { piece: Some(Piece::Chunk(bytes.to_vec().into())) }
}

/// A whole upload, in chunks of 1,000 bytes.
pub fn pieces(kind: v1::MediaKind, file: &[u8], cache_salt: Option<&str>) -> Vec<v1::UploadMediaRequest> {
    [header(kind, file.len(), cache_salt)].into_iter().chain(file.chunks(1000).map(chunk)).collect()
}

/// Sends an upload; the id of its file.
///
/// # Errors
/// When it is refused.
pub async fn upload(service: &mut Service, pieces: Vec<v1::UploadMediaRequest>) -> Result<Vec<u8>, Status> {
    let told = service.upload_media(futures::stream::iter(pieces)).await?;
    Ok(told.into_inner().media_id.to_vec())
}
