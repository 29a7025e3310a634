//! Layers that own tensor parallelism.
