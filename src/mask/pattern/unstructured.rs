//! `unstructured`: zeros anywhere.

use super::Kind;

pub(super) static UNSTRUCTURED: Kind = Kind {
    form: "`unstructured`",
    help: "anywhere",
    examples: &["unstructured"],
    regex: None,
    read: |text| (text == "unstructured").then_some(Ok([0, 0])),
    write: |_, f| f.write_str("unstructured"),
    tile: |_, _| None,
    ratio: |_| None,
};
