//! From a conversation to token ids: chat template, tokenizer, and the runs of pad tokens of media.
