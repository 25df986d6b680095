//! `dense`: every matrix in full, zeros included.

use super::Layout;

pub(super) static DENSE: Layout = Layout {
    name: "dense",
    help: "as dense matrices, zeros included",
    pattern: None,
    loading: include_str!("dense.md"),
    packing: None,
};
