//! Pictures and videos of the command line, and what is said of them.

use std::path::PathBuf;

use crate::{Image, Part, Video};

/// What a file or folder is sent as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MediumKind {
    /// A picture's file.
    Image,
    /// A video's file.
    Video,
    /// A folder of pictures that are a video's frames.
    Frames,
}

/// A picture or video as it was typed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MediumArg {
    /// What it is sent as.
    pub(crate) kind: MediumKind,
    /// The file or folder.
    pub(crate) path: PathBuf,
    /// What was said of it; of several about the same the last counts.
    pub(crate) settings: Vec<Setting>,
}

/// What a flag says of a picture or video.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Setting {
    MinPixels(u32),
    MaxPixels(u32),
    ResizedWidth(u32),
    ResizedHeight(u32),
    Fps(f64),
    MaxFrames(u32),
    TotalPixels(u64),
}

impl Setting {
    /// The flag that says it.
    pub(crate) fn flag(&self) -> &'static str {
        match self {
            Setting::MinPixels(_) => "--min-pixels",
            Setting::MaxPixels(_) => "--max-pixels",
            Setting::ResizedWidth(_) => "--resized-width",
            Setting::ResizedHeight(_) => "--resized-height",
            Setting::Fps(_) => "--fps",
            Setting::MaxFrames(_) => "--max-frames",
            Setting::TotalPixels(_) => "--total-pixels",
        }
    }

    /// What it can be said of.
    pub(crate) fn fits(&self, kind: MediumKind) -> bool {
        match self {
            Setting::MinPixels(_) | Setting::MaxPixels(_) => true,
            Setting::ResizedWidth(_) | Setting::ResizedHeight(_) => kind == MediumKind::Image,
            Setting::Fps(_) | Setting::TotalPixels(_) => kind != MediumKind::Image,
            // Of given frames all are taken.
            Setting::MaxFrames(_) => kind == MediumKind::Video,
        }
    }

    /// What it can be said of, in words.
    pub(crate) fn whom(&self) -> &'static str {
        match self {
            Setting::MinPixels(_) | Setting::MaxPixels(_) => {
                "a picture (--image) or a video (--video, --frames)"
            }
            Setting::ResizedWidth(_) | Setting::ResizedHeight(_) => "a picture (--image)",
            Setting::Fps(_) | Setting::TotalPixels(_) => "a video (--video, --frames)",
            Setting::MaxFrames(_) => "a video (--video)",
        }
    }
}

impl MediumArg {
    /// A medium of which everything in `for_all` is said that fits it.
    pub(crate) fn new(kind: MediumKind, path: PathBuf, for_all: &[Setting]) -> Self {
        let settings = for_all.iter().filter(|setting| setting.fits(kind)).copied().collect();
        MediumArg { kind, path, settings }
    }

    /// Says something of it.
    ///
    /// # Errors
    /// In words: it does not fit.
    pub(crate) fn set(&mut self, setting: Setting) -> Result<(), String> {
        if !setting.fits(self.kind) {
            let path = self.path.display();
            return Err(format!("{} after {path}: it is for {}", setting.flag(), setting.whom()));
        }
        self.settings.push(setting);
        Ok(())
    }

    /// Whether all is said that must be.
    ///
    /// # Errors
    /// In words: what is missing.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.kind == MediumKind::Frames && self.fps().is_none() {
            let path = self.path.display();
            return Err(format!("--frames {path} needs --fps: how many of its pictures make a second"));
        }
        Ok(())
    }

    fn fps(&self) -> Option<f64> {
        let fps = |setting: &Setting| if let Setting::Fps(fps) = setting { Some(*fps) } else { None };
        self.settings.iter().filter_map(fps).next_back()
    }

    /// Reads the file or folder.
    pub(crate) fn load(&self) -> anyhow::Result<Part> {
        let video = match self.kind {
            MediumKind::Image => return Ok(self.load_image()?.into()),
            MediumKind::Video => Video::open(&self.path)?,
            // The rate is there: `check` looked.
            MediumKind::Frames => Video::open_frames(&self.path, self.fps().unwrap_or_default())?,
        };
        let said = |video: Video, setting: &Setting| match *setting {
            Setting::MinPixels(pixels) => video.min_pixels(pixels),
            Setting::MaxPixels(pixels) => video.max_pixels(pixels),
            Setting::TotalPixels(pixels) => video.total_pixels(pixels),
            Setting::MaxFrames(frames) => video.max_frames(frames),
            Setting::Fps(fps) if self.kind == MediumKind::Video => video.fps(fps),
            Setting::Fps(_) | Setting::ResizedWidth(_) | Setting::ResizedHeight(_) => video,
        };
        Ok(self.settings.iter().fold(video, said).into())
    }

    fn load_image(&self) -> anyhow::Result<Image> {
        let said = |image: Image, setting: &Setting| match *setting {
            Setting::MinPixels(pixels) => image.min_pixels(pixels),
            Setting::MaxPixels(pixels) => image.max_pixels(pixels),
            Setting::ResizedWidth(pixels) => image.resized_width(pixels),
            Setting::ResizedHeight(pixels) => image.resized_height(pixels),
            Setting::Fps(_) | Setting::MaxFrames(_) | Setting::TotalPixels(_) => image,
        };
        Ok(self.settings.iter().fold(Image::open(&self.path)?, said))
    }
}
