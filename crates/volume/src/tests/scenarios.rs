//! Chosen situations, one at a time.
