//! Warnings about settings without effect, which are not errors.

use super::{Loaded, MetricStep, Prompts, Scope};

impl Loaded {
    /// Warnings about settings without effect; each names the key and where it is set.
    pub fn advice(&self) -> Vec<String> {
        let recipe = &self.recipe;
        let scored = recipe.refine.iter().filter(|stage| stage.uses_metrics());
        let scopes = scored.filter_map(|stage| stage.scope());
        let scopes: Vec<Scope> =
            scopes.chain(recipe.overrides.iter().filter_map(|of| of.scope)).collect();
        let initial = [recipe.mask.scope.unwrap_or(Scope::Row)];
        let mut advice = Vec::new();
        // The scores of a structure are of several matrices.
        if recipe.structures().is_empty() {
            advice.extend(self.idle_normalising("mask.metric", &recipe.mask.metric, &initial));
        }
        advice.extend(self.idle_of_structures());
        let uses = recipe.refine.iter().any(|stage| stage.uses_metrics());
        let first = "metric.0.use";
        if uses {
            advice.extend(self.idle_normalising("metric", &recipe.metric, &scopes));
        } else if !recipe.metric.is_empty() && self.origin(first) != "default" {
            advice.push(format!(
                "`metric` ({}) has no effect: only the stage `rebuild` uses it; initial masks use \
                 `mask.metric`",
                self.origin(first)
            ));
        }
        if let Prompts::Beginnings(1..) = recipe.evaluate.generate
            && recipe.evaluate.perplexity.is_empty()
        {
            advice.push(format!(
                "`evaluate.generate` ({}) has no effect: it continues beginnings of the texts of \
                 `evaluate.perplexity`, which has none",
                self.origin("evaluate.generate")
            ));
        }
        advice
    }

    /// Warnings about settings that the removal of whole structures does not use.
    fn idle_of_structures(&self) -> Vec<String> {
        let (structures, mut advice) = (self.recipe.structures(), Vec::new());
        let mut idle = |key: &str, why: &str| {
            let origin = self.origin(key);
            if origin != "default" {
                advice.push(format!("`{key}` ({origin}) has no effect: {why}"));
            }
        };
        if !self.recipe.sparsity.structures.is_empty() {
            idle("sparsity.ratio", "each table of `sparsity.structures` has its own");
        }
        if self.recipe.sparsity.multiple > 1
            && !structures.iter().any(|(_, of)| of.structure.has_multiples())
        {
            idle("sparsity.multiple", "it is for the removal of channels");
        }
        let rebuilds = self.recipe.refine.iter().enumerate();
        for (i, _) in rebuilds.filter(|(_, stage)| !structures.is_empty() && stage.uses_metrics()) {
            idle(&format!("refine.{i}.scope"), "structures of a layer compete with one another");
        }
        advice
    }

    /// Warnings about `normalise` steps that do not change the order of competing weights.
    fn idle_normalising(
        &self,
        key: &str,
        pipeline: &[MetricStep],
        scopes: &[Scope],
    ) -> Vec<String> {
        let steps = pipeline.iter().enumerate().filter(|(_, of)| of.metric == "normalise");
        let idle = steps.filter_map(|(i, of)| {
            let over = of.parameters.get("over").and_then(|over| over.as_str()).unwrap_or("row");
            // Scopes that lie within what the mean is taken over.
            let within: &[Scope] = match over {
                "row" => &[Scope::Row],
                "column" => &[Scope::Column],
                _ => &[Scope::Row, Scope::Column, Scope::Layer],
            };
            let scope = scopes.first()?;
            scopes.iter().all(|scope| within.contains(scope)).then(|| {
                format!(
                    "`{key}.{i}` ({}) has no effect: `normalise` over a {over} divides all weights \
                     that compete in a {scope} by one number",
                    self.origin(&format!("{key}.{i}.use"))
                )
            })
        });
        idle.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::load_text;

    fn advice(text: &str) -> Vec<String> {
        let fine = "model.path = 'm'\ncalibration.source = 'c'\noutput.path = 'o'\n";
        load_text(Path::new("r.toml"), &format!("{fine}{text}\n"), [], &[]).unwrap().advice()
    }

    #[test]
    fn a_metric_that_no_stage_uses_is_named() {
        let metric = "metric = [{ use = 'gradient' }]\n";
        for (refine, idle) in [
            ("", true),
            ("refine = [{ use = 'swap' }]", true),
            ("refine = [{ use = 'swap' }, { use = 'rebuild' }]", false),
        ] {
            let found = advice(&format!("{metric}{refine}"));
            assert_eq!(found.len(), usize::from(idle), "{found:?}");
            assert!(
                found.iter().all(|of| of.starts_with("`metric` (r.toml line 4) has no effect"))
            );
        }
        // The default is nobody's mistake.
        assert_eq!(advice("refine = [{ use = 'swap' }]"), [""; 0]);
    }

    #[test]
    fn what_structures_do_not_use_is_named() {
        let channels = "sparsity.structure = 'channels'\nsparsity.ratio = 0.2\n";
        let list = "sparsity.structures = [{ structure = 'heads', ratio = 0.5 }]\n";
        for (text, key) in [
            ("sparsity.multiple = 2\n".to_owned(), "sparsity.multiple"),
            (format!("{list}sparsity.multiple = 2\n"), "sparsity.multiple"),
            (format!("{list}sparsity.ratio = 0.2\n"), "sparsity.ratio"),
            (
                format!("{channels}refine = [{{ use = 'rebuild', scope = 'layer' }}]"),
                "refine.0.scope",
            ),
        ] {
            let found = advice(&text);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(found[0].starts_with(&format!("`{key}` (r.toml line ")), "{found:?}");
        }
        let used = format!("{channels}sparsity.multiple = 2\nrefine = [{{ use = 'rebuild' }}]");
        assert_eq!(advice(&used), [""; 0]);
        assert_eq!(advice(list), [""; 0]);
    }

    #[test]
    fn beginnings_of_no_text_are_named() {
        let found = advice("evaluate.generate = 2");
        assert!(found[0].starts_with("`evaluate.generate` (r.toml line 4) has no effect"));
        assert_eq!(advice("evaluate = { generate = 2, perplexity = ['t'] }"), [""; 0]);
        assert_eq!(advice("evaluate.generate = ['The']"), [""; 0]);
    }

    #[test]
    fn normalising_what_competes_is_named() {
        for (over, scope, idle) in [
            ("row", "row", true),
            ("row", "column", false),
            ("row", "layer", false),
            ("row", "group", false),
            ("column", "row", false),
            ("column", "column", true),
            ("layer", "row", true),
            ("layer", "column", true),
            ("layer", "layer", true),
            ("layer", "group", false),
        ] {
            let found = advice(&format!(
                "metric = [{{ use = 'gradient' }}, {{ use = 'normalise', over = '{over}' }}]\n\
                 refine = [{{ use = 'rebuild', scope = '{scope}' }}]"
            ));
            assert_eq!(found.len(), usize::from(idle), "{over} {scope}: {found:?}");
            assert!(found.iter().all(|of| of.contains("`metric.1` (r.toml line 4)")), "{found:?}");
        }
        // Left out, both are rows; an override may compete elsewhere.
        let pipeline = "metric = [{ use = 'normalise' }]\nrefine = [{ use = 'rebuild' }]\n";
        assert_eq!(advice(pipeline).len(), 1);
        let other = "override = [{ tensors = '*.q_proj', scope = 'layer' }]";
        assert_eq!(advice(&format!("{pipeline}{other}")), [""; 0]);
        let mask = "mask = { init = 'metric', metric = [{ use = 'ria' }, { use = 'normalise' }] }";
        assert!(advice(mask)[0].contains("`mask.metric.1`"), "{:?}", advice(mask));
        let layer = mask.replace("init", "scope = 'layer', init");
        assert_eq!(advice(&layer), [""; 0]);
    }
}
