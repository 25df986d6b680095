//! Tables, in Markdown.

use std::fmt;

use textwrap::core::display_width;

use super::{
    clean,
    columns::{fitted, wrapped},
};

/// A table, with its columns aligned for a reader of plain text.
pub(super) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a title. The first row is the head; the first cell of a row is its name.
    pub(super) fn new(title: impl Into<String>, rows: Vec<Vec<String>>) -> Self {
        let escaped = |cell: String| clean::line(&cell).replace('|', "\\|");
        let escaped = |row: Vec<String>| row.into_iter().map(escaped).collect();
        Self { title: title.into(), rows: rows.into_iter().map(escaped).collect() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((head, rows)) = self.rows.split_first() else { return Ok(()) };
        write!(f, "{}\n\n{}\n", wrapped("", "", &self.title), fitted(self.markdown(), head, rows))
    }
}

impl Table {
    fn markdown(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let length = |row: &Vec<String>, i: usize| display_width(&row[i]);
        let widths: Vec<usize> = (0..columns)
            .map(|i| self.rows.iter().map(|row| length(row, i)).max().unwrap_or(0).max(2))
            .collect();
        let mut lines = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).enumerate().map(|(j, (cell, width))| {
                let fill = " ".repeat(width - display_width(cell));
                if j == 0 { format!(" {cell}{fill} ") } else { format!(" {fill}{cell} ") }
            });
            lines.push(format!("|{}|", cells.collect::<Vec<_>>().join("|")));
            if i == 0 {
                let rules = widths.iter().enumerate().map(|(j, width)| match j {
                    0 => "-".repeat(width + 2),
                    _ => format!("{}:", "-".repeat(width + 1)),
                });
                lines.push(format!("|{}|", rules.collect::<Vec<_>>().join("|")));
            }
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = vec![
            row(["", "50%", "2:4"]),
            row(["Wanda", "1.250 ± 0.354", "2"]),
            row(["a ± b", "3", "477.34"]),
        ];
        let table = Table::new("Seconds", rows);
        let expected = "\
Seconds

|       |           50% |    2:4 |
|-------|--------------:|-------:|
| Wanda | 1.250 ± 0.354 |      2 |
| a ± b |             3 | 477.34 |
";
        assert_eq!(table.to_string(), expected);
    }
}
