//! Which matrices are pruned and which are rebuilt together.

use std::collections::BTreeSet;

use crate::{
    family::{self, Decoder, Layer, Linear, Part},
    mask::{Pattern, Scope},
};

/// A group of matrices of one part of a decoder layer, rebuilt as one.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// What the recipe calls it.
    pub name: String,
    /// The part whose output error it is judged by.
    pub part: Part,
    /// Its matrices.
    pub members: Vec<Member>,
}

/// A matrix of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Member {
    /// Index into [`Layer::linears`] of the part.
    pub linear: usize,
    /// How it is pruned.
    pub rule: Rule,
}

/// How a matrix is pruned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Where its zeros may be.
    pub pattern: Pattern,
    /// The share of its weights to prune.
    pub ratio: f64,
    /// Where its weights compete in the rebuild.
    pub scope: Scope,
}

/// The groups of every decoder layer, in the order in which they are rebuilt.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One list per decoder layer.
    pub layers: Vec<Vec<Group>>,
}

/// A `[[blocks]]` entry: its name and the linear layers that it groups.
pub type Block = (String, Vec<String>);

/// Why blocks do not fit a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A block names a layer that the model has not.
    #[error("block `{block}`: the model has no linear layer `{layer}`; it has {known}")]
    UnknownLayer {
        /// The block.
        block: String,
        /// What it names.
        layer: String,
        /// What there is.
        known: String,
    },
    /// A block pools layers that have no output in common.
    #[error(
        "block `{0}` pools layers of self-attention and of the MLP, which have no output in \
         common; make a block of each"
    )]
    AcrossParts(String),
    /// Everything is excluded.
    #[error("nothing is left to prune: sparsity.exclude matches every matrix of the blocks")]
    Nothing,
}

impl Plan {
    /// The plan of `blocks`, or of the family's own if there are none; `rule` says how the matrix
    /// of a tensor name is pruned, if it is.
    ///
    /// # Errors
    /// If a block does not fit the model, or nothing is left.
    pub fn new(
        decoder: &Decoder,
        blocks: &[Block],
        rule: impl Fn(&str) -> Option<Rule>,
    ) -> Result<Self, Error> {
        let defaults: Vec<Block>;
        let blocks = if blocks.is_empty() {
            let own = decoder.default_blocks().into_iter();
            let named = |block: family::Block| {
                (block.name.into(), block.layers.into_iter().map(Into::into).collect())
            };
            defaults = own.map(named).collect();
            &defaults
        } else {
            blocks
        };
        let mut layers = Vec::new();
        for layer in &decoder.layers {
            let groups = blocks.iter().map(|block| resolve(layer, block, &rule));
            let mut groups = groups.collect::<Result<Vec<_>, _>>()?;
            groups.retain(|group| !group.members.is_empty());
            groups.sort_by_key(|group| group.part);
            layers.push(groups);
        }
        if layers.iter().all(Vec::is_empty) {
            return Err(Error::Nothing);
        }
        Ok(Self { layers })
    }

    /// The matrices of a layer that are pruned, in the order of the groups.
    pub fn matrices<'a>(
        &'a self,
        decoder: &'a Decoder,
        layer: usize,
    ) -> impl Iterator<Item = (Part, Member, &'a Linear)> {
        self.layers[layer].iter().flat_map(move |group| {
            let linears = decoder.layers[layer].linears(group.part);
            group.members.iter().map(move |member| (group.part, *member, &linears[member.linear]))
        })
    }
}

fn resolve(
    layer: &Layer,
    (name, wanted): &Block,
    rule: impl Fn(&str) -> Option<Rule>,
) -> Result<Group, Error> {
    let mut found: BTreeSet<(Part, usize)> = BTreeSet::new();
    for wanted in wanted {
        let place = Part::ALL.into_iter().find_map(|part| {
            let i = layer.linears(part).iter().position(|linear| linear.name == wanted)?;
            Some((part, i))
        });
        found.insert(place.ok_or_else(|| {
            Error::UnknownLayer {
                block: name.clone(),
                layer: wanted.clone(),
                known: Part::ALL
                    .into_iter()
                    .flat_map(|part| layer.linears(part))
                    .map(|linear| linear.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            }
        })?);
    }
    let parts: BTreeSet<Part> = found.iter().map(|(part, _)| *part).collect();
    match parts.first() {
        Some(&part) if parts.len() == 1 => {
            let linears = layer.linears(part);
            let members = found.into_iter().filter_map(|(_, linear)| {
                Some(Member { linear, rule: rule(&linears[linear].weight)? })
            });
            Ok(Group { name: name.clone(), part, members: members.collect() })
        }
        _ => Err(Error::AcrossParts(name.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn decoder() -> Decoder {
        crate::family::decoder(&json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16
        }))
        .unwrap()
    }

    const RULE: Rule = Rule { pattern: Pattern::Unstructured, ratio: 0.5, scope: Scope::Row };

    fn group(name: &str, part: Part, members: &[usize]) -> Group {
        let members = members.iter().map(|&linear| Member { linear, rule: RULE }).collect();
        Group { name: name.into(), part, members }
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
        let names: Vec<_> = plan.matrices(&decoder, 1).map(|(_, _, linear)| linear.name).collect();
        assert_eq!(names, ["q_proj", "k_proj", "down_proj"]);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let error = |blocks: &[Block]| Plan::new(&decoder(), blocks, |_| Some(RULE)).unwrap_err();
        let message = error(&[block("b", &["qproj"])]).to_string();
        assert!(message.contains("`qproj`") && message.contains("q_proj, k_proj"), "{message}");
        assert_eq!(error(&[block("b", &["o_proj", "up_proj"])]), Error::AcrossParts("b".into()));
        assert_eq!(Plan::new(&decoder(), &[], |_| None), Err(Error::Nothing));
    }
}
