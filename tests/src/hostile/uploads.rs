//! Uploads that must be refused.

use lockstep_proto::v1;
use lockstep_proto::v1::UploadMediaRequest as Piece;
use lockstep_proto::v1::upload_media_request::Piece::Header;

use crate::golden::root;
use crate::uploads::{LIBRARY_BYTES, chunk, header, pieces};

const MIB: usize = 1 << 20;

/// An upload, and the field of it that is at fault.
pub struct BadUpload {
    /// What is wrong with it.
    pub name: &'static str,
    /// What is sent.
    pub pieces: Vec<Piece>,
    /// The field.
    pub field: &'static str,
}

/// All of them, for a server that keeps [`LIBRARY_BYTES`].
///
/// # Errors
/// When a file of theirs cannot be read.
pub fn bad_uploads() -> anyhow::Result<Vec<BadUpload>> {
    use v1::MediaKind::{Image, Video};
    let still = std::fs::read(root().join("tests/pictures/noise_33x29.png"))?;
    let film = std::fs::read(root().join("tests/videos/reordered.mp4"))?;
    let image = |size_bytes| header(Image, size_bytes, None);
    let of_kind =
        |kind| Piece { piece: Some(Header(v1::UploadHeader { kind, size_bytes: 1, cache_salt: None })) };
    let bad = |name, pieces, field| BadUpload { name, pieces, field };
    let size = "header.size_bytes";
    Ok(vec![
        bad("nothing", vec![], "header"),
        bad("no header", vec![chunk(&still)], "header"),
        bad("two headers", vec![image(1), image(1)], "header"),
        bad("a piece that is none", vec![image(1), Piece { piece: None }], "piece"),
        bad("a size of nothing", vec![image(0)], size),
        bad("no file", vec![image(still.len())], size),
        bad("a file that is shorter", vec![image(still.len() + 1), chunk(&still)], size),
        bad("a file that is longer", vec![image(still.len() - 1), chunk(&still)], size),
        bad("a file that fills the library", vec![image(LIBRARY_BYTES)], size),
        bad("a file of all bytes", vec![image(usize::MAX)], size),
        bad("a picture beyond its bound", vec![image(64 * MIB + 1)], size),
        bad("a video beyond its bound", vec![header(Video, 256 * MIB + 1, None)], size),
        bad("a long salt", vec![header(Image, 1, Some(&"s".repeat(10_000)))], "header.cache_salt"),
        bad("no kind", vec![of_kind(0)], "header.kind"),
        bad("another kind", vec![of_kind(77)], "header.kind"),
        bad("words", pieces(Image, b"This is no picture.", None), "chunk"),
        bad("a picture that is cut", pieces(Image, &still[..20], None), "chunk"),
        bad("a video that is cut", pieces(Video, &film[..100], None), "chunk"),
        bad("a picture as a video", pieces(Video, &still, None), "chunk"),
        bad("a video as a picture", pieces(Image, &film, None), "chunk"),
    ])
}
