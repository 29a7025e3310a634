//! A device that only counts: it runs the model over shapes, to plan memory.
