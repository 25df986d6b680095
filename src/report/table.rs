//! Tables of a page.

use maud::{Markup, html};

/// A table: its caption, its head, and rows whose first cells name them. It can be scrolled where
/// it is too wide, by keyboard too.
pub(super) fn table(
    caption: &str,
    head: &[impl AsRef<str>],
    rows: impl IntoIterator<Item = Vec<Markup>>,
) -> Markup {
    html! {
        div.scroll role="region" aria-label=(caption) tabindex="0" {
            table {
                caption { (caption) }
                thead { tr { @for name in head { th scope="col" { (name.as_ref()) } } } }
                tbody {
                    @for row in rows {
                        tr {
                            @for (i, cell) in row.into_iter().enumerate() {
                                @if i == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A table that is shown when it is asked for.
pub(super) fn details(summary: &str, content: &Markup) -> Markup {
    html! { details { summary { (summary) } (content) } }
}

/// Text with a bar that is as long as a fraction says.
pub(super) fn bar(text: &str, fraction: f64) -> Markup {
    let fraction = if fraction.is_finite() { fraction.clamp(0.0, 1.0) } else { 0.0 };
    let width = format!("width:{:.1}%", 100.0 * fraction);
    html! { span.figure { (text) } span.bar aria-hidden="true" { span style=(width) {} } }
}

/// Text.
pub(super) fn text(text: impl AsRef<str>) -> Markup {
    html! { (text.as_ref()) }
}
