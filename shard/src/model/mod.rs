//! The model, as the paper has it.
