//! Short names that tell things apart.

/// The shortest ends of names, cut at `at`, that differ as far as the names do.
///
/// `model.layers.*.mlp.up_proj` and `model.layers.*.self_attn.o_proj`, cut at dots, are `up_proj`
/// and `o_proj`.
pub(super) fn short(names: &[String], at: char) -> Vec<String> {
    let parts: Vec<Vec<&str>> =
        names.iter().map(|name| name.split(at).filter(|part| !part.is_empty()).collect()).collect();
    let shortened = |i: usize| {
        let own = &parts[i];
        let end = |of: &Vec<&str>, count: usize| of[of.len().saturating_sub(count)..].join("/");
        let differs = |count: &usize| {
            let mut others = parts.iter().filter(|other| *other != own);
            others.all(|other| end(other, *count) != end(own, *count))
        };
        match own.is_empty() {
            true => names[i].clone(),
            false => {
                let count = (1..own.len()).find(differs).unwrap_or(own.len());
                own[own.len() - count..].join(&at.to_string())
            }
        }
    };
    (0..names.len()).map(shortened).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortened(names: &[&str], at: char) -> Vec<String> {
        short(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>(), at)
    }

    #[test]
    fn names_are_as_long_as_they_must_be() {
        assert_eq!(shortened(&["a.b.x", "a.c.y"], '.'), ["x", "y"]);
        assert_eq!(shortened(&["out/a/x", "out/b/x", "c"], '/'), ["a/x", "b/x", "c"]);
        assert_eq!(shortened(&["x", "a/x"], '/'), ["x", "a/x"]);
        assert_eq!(shortened(&["a/x", "a/x"], '/'), ["x", "x"]);
        assert_eq!(shortened(&["/", ""], '/'), ["/", ""]);
    }
}
