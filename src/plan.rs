//! The plan of a run: the matrices to prune, and their groups.

use std::collections::{BTreeMap, BTreeSet};

use globset::{Glob, GlobMatcher};

use crate::{
    family::{Decoder, Layer, Part, Projection},
    mask::{Pattern, Scope},
    structure::Removal,
};

/// A group of matrices of one decoder layer that are refined together.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Name in the recipe.
    pub name: String,
    /// Parts that contain the matrices: the output error is measured over these.
    pub parts: Vec<Part>,
    /// Matrices of the group.
    pub members: Vec<Member>,
}

impl Group {
    /// Indices of the group's matrices, one list per part.
    pub fn linears(&self) -> Vec<Vec<usize>> {
        let of = |part: &Part| {
            let members = self.members.iter().filter(|member| member.part == *part);
            members.map(|member| member.linear).collect()
        };
        self.parts.iter().map(of).collect()
    }
}

/// A matrix of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member {
    /// Part that contains the matrix.
    pub part: Part,
    /// Index into [`Layer::projections`] of the part.
    pub linear: usize,
    /// How the matrix is pruned.
    pub rule: Rule,
}

/// How a matrix is pruned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Sparsity pattern.
    pub pattern: Pattern,
    /// Fraction of the weights to prune.
    pub ratio: f64,
    /// Exact number of weights to prune, if an allocation has set one.
    pub count: Option<usize>,
    /// Scope of the selection, if it differs from the method's own.
    pub scope: Option<Scope>,
}

/// The groups of every decoder layer, in the order in which they are refined.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One list per decoder layer.
    pub layers: Vec<Vec<Group>>,
    /// The structures that are removed as a whole; `None` where single weights are pruned.
    pub removal: Option<Removal>,
}

/// A `[[blocks]]` entry: its name and the linear layers that it groups, by their names or by globs
/// over these, such as `*.experts.3.*`.
pub type Block = (String, Vec<String>);

/// Why blocks do not fit a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A block names a linear layer that the model does not have.
    #[error("block `{block}`: no decoder layer has a linear layer `{layer}`, known: {known}")]
    UnknownLayer {
        /// Name of the block.
        block: String,
        /// Unknown layer name.
        layer: String,
        /// Known layer names.
        known: String,
    },
    /// A block has an invalid glob.
    #[error("block `{block}`: `{glob}` is no glob over linear layers: {problem}")]
    Glob {
        /// Name of the block.
        block: String,
        /// The glob.
        glob: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Two blocks have the same matrix.
    #[error("`{tensor}` is in the blocks `{}` and `{}`; leave it in one", blocks[0], blocks[1])]
    Twice {
        /// Tensor name of the matrix.
        tensor: String,
        /// Names of the blocks.
        blocks: [String; 2],
    },
    /// The exclusions leave no matrix to prune.
    #[error("nothing is left to prune: sparsity.exclude matches every matrix of the blocks")]
    Nothing,
}

impl Plan {
    /// Plans `blocks`, or one for each part of a layer if `blocks` is empty. `rule` maps a tensor
    /// name to how its matrix is pruned; `None` leaves the matrix dense.
    ///
    /// # Errors
    /// If a block names a layer that no decoder layer has, two blocks have the same matrix, or no
    /// matrix is left to prune.
    pub fn new(
        decoder: &Decoder,
        blocks: &[Block],
        rule: impl Fn(&str) -> Option<Rule>,
    ) -> Result<Self, Error> {
        let blocks = blocks.iter().map(|block| Named::new(decoder, block));
        let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
        let mut layers = Vec::new();
        for layer in &decoder.layers {
            let mut groups: Vec<Group> = if blocks.is_empty() {
                let names = |part: &Part| group(layer, part.name(), |of, _| of == *part, &rule);
                Part::ALL.iter().map(names).collect()
            } else {
                check_once(layer, &blocks)?;
                let has = |block: &Named, of: &Projection| block.names.iter().any(|n| n.is(of));
                let grouped =
                    |block: &Named| group(layer, &block.name, |_, of| has(block, of), &rule);
                blocks.iter().map(grouped).collect()
            };
            groups.retain(|group| !group.members.is_empty());
            groups.sort_by(|a, b| a.parts.cmp(&b.parts));
            layers.push(groups);
        }
        if layers.iter().all(Vec::is_empty) {
            return Err(Error::Nothing);
        }
        Ok(Self { layers, removal: None })
    }

    /// Plans the removal of structures from the matrices that have them, each part a group.
    ///
    /// # Errors
    /// If there is no matrix.
    pub fn of_structures(decoder: &Decoder, removal: Removal) -> Result<Self, Error> {
        let matrices = removal.matrices(decoder);
        let plan = Self::new(decoder, &[], |name| {
            let (ratio, count) = *matrices.get(name)?;
            Some(Rule { pattern: Pattern::UNSTRUCTURED, ratio, count, scope: None })
        })?;
        Ok(Self { removal: Some(removal), ..plan })
    }

    /// What of a layer's matrix is pruned: its pattern, or structures.
    pub fn what(&self, layer: usize, of: Member) -> String {
        match &self.removal {
            Some(removal) => removal.what(layer, of.part, of.linear),
            None => of.rule.pattern.to_string(),
        }
    }

    /// The pruned matrices of a layer, in the order of the groups.
    pub fn matrices<'a>(
        &'a self,
        decoder: &'a Decoder,
        layer: usize,
    ) -> impl Iterator<Item = (Member, &'a Projection)> {
        let members = self.layers[layer].iter().flat_map(|group| &group.members);
        members.map(move |member| (*member, member.of(&decoder.layers[layer])))
    }
}

impl Plan {
    /// Number of weights of the matrices, and number of them to prune. With row scope slightly
    /// fewer are pruned: the number per row is rounded down.
    pub fn weights(&self, decoder: &Decoder) -> [usize; 2] {
        let layers = 0..self.layers.len();
        let matrices = layers.flat_map(|layer| self.matrices(decoder, layer));
        let each = matrices.map(|(member, linear)| {
            let (weights, rule) = (linear.dims.len(), member.rule);
            let pruned = rule.count.unwrap_or((rule.ratio * weights as f64) as usize);
            [weights, pruned]
        });
        each.fold([0, 0], |[all, pruned], [weights, gone]| [all + weights, pruned + gone])
    }

    /// Number of weights to prune by tensor name, for tensors with an exact count.
    pub fn counts(&self, decoder: &Decoder) -> BTreeMap<String, usize> {
        let layers = 0..self.layers.len();
        let matrices = layers.flat_map(|layer| self.matrices(decoder, layer));
        matrices.filter_map(|(of, linear)| Some((linear.weight.clone(), of.rule.count?))).collect()
    }

    /// Sets the exact number of weights to prune of each tensor; tensors not in `counts` have
    /// none.
    pub fn count(&mut self, decoder: &Decoder, counts: &BTreeMap<String, usize>) {
        for (groups, layer) in self.layers.iter_mut().zip(&decoder.layers) {
            for member in groups.iter_mut().flat_map(|group| &mut group.members) {
                member.rule.count = counts.get(&member.of(layer).weight).copied();
            }
        }
    }
}

impl Member {
    /// The matrix of `layer` that this member points to.
    pub fn of(self, layer: &Layer) -> &Projection {
        &layer.projections(self.part)[self.linear]
    }
}

/// A `[[blocks]]` entry with its globs.
struct Named {
    name: String,
    names: Vec<Name>,
}

/// The name of linear layers.
enum Name {
    Plain(String),
    Glob(GlobMatcher),
}

impl Name {
    /// Whether a projection is called so.
    fn is(&self, projection: &Projection) -> bool {
        match self {
            Self::Plain(name) => projection.is_called(name),
            Self::Glob(glob) => glob.is_match(&projection.name),
        }
    }
}

impl Named {
    /// A block, each of whose names at least one layer of the decoder must have.
    fn new(decoder: &Decoder, (block, layers): &Block) -> Result<Self, Error> {
        let mut names = Vec::new();
        for wanted in layers {
            let name = if wanted.contains(['*', '?', '[', '{']) {
                let invalid = |problem: globset::Error| Error::Glob {
                    block: block.clone(),
                    glob: wanted.clone(),
                    problem: problem.to_string(),
                };
                Name::Glob(Glob::new(wanted).map_err(invalid)?.compile_matcher())
            } else {
                Name::Plain(wanted.clone())
            };
            if !decoder.projections().any(|of| name.is(of)) {
                let mut known: Vec<_> = decoder.projections().map(Projection::short_name).collect();
                let mut seen = BTreeSet::new();
                known.retain(|name| seen.insert(*name));
                let (block, layer) = (block.clone(), wanted.clone());
                return Err(Error::UnknownLayer { block, layer, known: known.join(", ") });
            }
            names.push(name);
        }
        Ok(Self { name: block.clone(), names })
    }
}

/// Checks that no matrix of a layer is in two blocks.
fn check_once(layer: &Layer, blocks: &[Named]) -> Result<(), Error> {
    for of in Part::ALL.iter().flat_map(|part| layer.projections(*part)) {
        let mut own = blocks.iter().filter(|block| block.names.iter().any(|name| name.is(of)));
        if let (Some(one), Some(other)) = (own.next(), own.next()) {
            let blocks = [one.name.clone(), other.name.clone()];
            return Err(Error::Twice { tensor: of.weight.clone(), blocks });
        }
    }
    Ok(())
}

/// The group of the projections of a layer that `has` chooses.
fn group(
    layer: &Layer,
    name: &str,
    has: impl Fn(Part, &Projection) -> bool,
    rule: impl Fn(&str) -> Option<Rule>,
) -> Group {
    let (mut parts, mut members) = (BTreeSet::new(), Vec::new());
    for part in Part::ALL {
        for (linear, of) in layer.projections(part).iter().enumerate() {
            if has(part, of) {
                parts.insert(part);
                let member = rule(&of.weight).map(|rule| Member { part, linear, rule });
                members.extend(member);
            }
        }
    }
    Group { name: name.into(), members, parts: parts.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        family::{Feed, Role},
        recipe::{Override, Recipe},
    };
    use serde_json::json;

    fn decoder() -> Decoder {
        crate::family::decoder(&json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16
        }))
        .unwrap()
    }

    const RULE: Rule =
        Rule { pattern: Pattern::UNSTRUCTURED, ratio: 0.5, count: None, scope: None };

    fn group(name: &str, part: Part, members: &[usize]) -> Group {
        let members = members.iter().map(|&linear| Member { part, linear, rule: RULE }).collect();
        Group { name: name.into(), parts: vec![part], members }
    }

    fn block(name: &str, layers: &[&str]) -> Block {
        (name.into(), layers.iter().map(|&layer| layer.into()).collect())
    }

    #[test]
    fn without_blocks_the_parts_are_the_groups() {
        let plan = Plan::new(&decoder(), &[], |_| Some(RULE)).unwrap();
        assert_eq!(plan.layers.len(), 2);
        assert_eq!(plan.layers[0][0], group("self-attention", Part::Attention, &[0, 1, 2, 3]));
        assert_eq!(plan.layers[1][1], group("mlp", Part::Mlp, &[0, 1, 2]));
    }

    #[test]
    fn blocks_choose_and_exclusion_removes() {
        let blocks = [block("down", &["down_proj"]), block("qk", &["k_proj", "q_proj"])];
        let rule = |name: &str| (!name.contains("layers.0.self_attn.q_proj")).then_some(RULE);
        let plan = Plan::new(&decoder(), &blocks, rule).unwrap();
        // Attention comes first, whatever the order of the recipe.
        let [first, second] = &plan.layers[..] else { panic!("two layers") };
        assert_eq!(first[..], [group("qk", Part::Attention, &[1]), group("down", Part::Mlp, &[2])]);
        assert_eq!(second[0], group("qk", Part::Attention, &[0, 1]));
        let decoder = decoder();
        let names: Vec<_> = plan.matrices(&decoder, 1).map(|(_, of)| of.short_name()).collect();
        assert_eq!(names, ["q_proj", "k_proj", "down_proj"]);
    }

    #[test]
    fn a_block_across_parts_comes_between_them() {
        let blocks = [
            block("down", &["down_proj"]),
            block("both", &["gate_proj", "v_proj"]),
            block("qk", &["q_proj", "k_proj"]),
        ];
        let plan = Plan::new(&decoder(), &blocks, |_| Some(RULE)).unwrap();
        let names: Vec<&str> = plan.layers[0].iter().map(|group| &*group.name).collect();
        assert_eq!(names, ["qk", "both", "down"]);
        assert_eq!(plan.layers[0][1].parts, Part::ALL);
        let members: Vec<_> =
            plan.layers[0][1].members.iter().map(|m| (m.part, m.linear)).collect();
        assert_eq!(members, [(Part::Attention, 2), (Part::Mlp, 0)]);
    }

    /// A decoder whose MLPs have two experts.
    fn of_experts() -> Decoder {
        let mut decoder = decoder();
        for (i, layer) in decoder.layers.iter_mut().enumerate() {
            let dense = std::mem::take(&mut layer.mlp.projections);
            let expert = |expert| {
                let of = move |of: &Projection| {
                    let name = format!("mlp.experts.{expert}.{}", of.short_name());
                    let weight = format!("model.layers.{i}.{name}.weight");
                    Projection { name, weight, expert: Some(expert), ..of.clone() }
                };
                dense.iter().map(of)
            };
            layer.mlp.projections = (0..2).flat_map(expert).collect();
        }
        decoder
    }

    #[test]
    fn experts_are_projections() {
        let decoder = of_experts();
        let of = |of: &Projection| (of.name.clone(), of.role, of.feed(), of.expert);
        let found: Vec<_> = decoder.layers[0].projections(Part::Mlp).iter().map(of).collect();
        let expected = [
            ("mlp.experts.0.gate_proj", Role::Gate, Feed::Hidden, 0),
            ("mlp.experts.0.up_proj", Role::Up, Feed::Hidden, 0),
            ("mlp.experts.0.down_proj", Role::Down, Feed::Inner, 0),
            ("mlp.experts.1.gate_proj", Role::Gate, Feed::Hidden, 1),
            ("mlp.experts.1.up_proj", Role::Up, Feed::Hidden, 1),
            ("mlp.experts.1.down_proj", Role::Down, Feed::Inner, 1),
        ];
        assert_eq!(found, expected.map(|(name, role, feed, i)| (name.into(), role, feed, Some(i))));
        let tensors: Vec<_> = decoder.tensors().map(|(name, _)| name).collect();
        assert!(tensors.contains(&"model.layers.1.mlp.experts.1.up_proj.weight"), "{tensors:?}");

        let recipe = Recipe {
            overrides: vec![Override {
                tensors: vec!["*.experts.1.*".into()],
                ratio: Some(0.25),
                ..Override::default()
            }],
            ..Recipe::default()
        };
        let rules = recipe.rules().unwrap();
        let members = |blocks: &[Block]| {
            let plan = Plan::new(&decoder, blocks, |name| rules.of(name)).unwrap();
            let members = plan.layers[1].iter().flat_map(|group| &group.members);
            let mlp = members.filter(|member| member.part == Part::Mlp);
            mlp.map(|member| (member.linear, member.rule.ratio)).collect::<Vec<_>>()
        };
        let all = [(0, 0.5), (1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)];
        assert_eq!(members(&[]), all);
        assert_eq!(members(&[block("down", &["down_proj"])]), [all[2], all[5]]);
        assert_eq!(members(&[block("one", &["experts.1.up_proj"])]), [all[4]]);
        assert_eq!(members(&[block("one", &["mlp.experts.0.gate_proj"])]), [all[0]]);
        assert_eq!(members(&[block("one", &["*.experts.1.*"])]), all[3..]);
        assert_eq!(
            members(&[block("one", &["*.{gate,up}_proj"])]),
            [all[0], all[1], all[3], all[4]]
        );
        let error =
            |blocks: &[Block]| Plan::new(&decoder, blocks, |_| Some(RULE)).unwrap_err().to_string();
        let message = error(&[block("b", &["proj"])]);
        assert!(message.ends_with("o_proj, gate_proj, up_proj, down_proj"), "{message}");
        let message = error(&[block("a", &["*.experts.1.*"]), block("b", &["up_proj"])]);
        let tensor = "`model.layers.0.mlp.experts.1.up_proj.weight` is in the blocks `a` and `b`";
        assert!(message.contains(tensor), "{message}");
        let message = error(&[block("b", &["*.experts.9.*"])]);
        assert!(message.contains("`*.experts.9.*`"), "{message}");
        let message = error(&[block("b", &["*.[up"])]);
        assert!(message.contains("`*.[up` is no glob"), "{message}");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let error = |blocks: &[Block]| Plan::new(&decoder(), blocks, |_| Some(RULE)).unwrap_err();
        let message = error(&[block("b", &["qproj"])]).to_string();
        assert!(message.contains("`qproj`") && message.contains("q_proj, k_proj"), "{message}");
        assert_eq!(Plan::new(&decoder(), &[], |_| None), Err(Error::Nothing));
    }
}
