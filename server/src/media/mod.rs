//! Pictures: from the bytes of a file to pixels at the size that the model sees.
