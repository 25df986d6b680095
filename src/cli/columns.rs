//! Columns of words and figures, as commands print them on a terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::NOTHING};

/// How a column stands under its heading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    /// Words, which begin together.
    Words(&'static str),
    /// Figures, which end together.
    Figures(&'static str),
}

/// An empty table with these columns.
pub(super) fn columns(columns: &[Column]) -> Table {
    let mut table = Table::new();
    let heading = |column: &Column| match *column {
        Column::Words(heading) | Column::Figures(heading) => heading,
    };
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(heading));
    for (i, (cells, column)) in table.column_iter_mut().zip(columns).enumerate() {
        cells.set_padding((if i == 0 { 0 } else { 2 }, 0));
        cells.set_cell_alignment(match column {
            Column::Words(_) => CellAlignment::Left,
            Column::Figures(_) => CellAlignment::Right,
        });
    }
    table
}
