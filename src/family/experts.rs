//! Mixtures of experts in place of the MLP of some layers.

use super::{
    Projection, Role, Router, Scoring,
    config::{Error, Object},
    rms::projection,
};
use crate::limits::EXPERTS;

/// The experts of a family.
pub(super) struct Experts {
    /// The names in a decoder layer.
    pub(super) names: Names,
    /// Number of experts of a layer.
    pub(super) count: usize,
    /// Number of experts of each token.
    pub(super) active: usize,
    /// Number of inner channels of an expert.
    pub(super) width: usize,
    /// The weights of a token's experts.
    pub(super) scoring: Scoring,
    /// Name in the router of the numbers that are added to scores for the choice, if there are any.
    pub(super) correction: Option<&'static str>,
    /// Whether router and experts have biases.
    pub(super) bias: bool,
    /// Every such layer has experts, the last of each so many.
    pub(super) step: usize,
    /// Indices of layers that have an MLP all the same.
    pub(super) dense: Vec<f64>,
    /// The expert that has all tokens, if there is one.
    pub(super) shared: Option<Shared>,
}

/// The names of a layer's mixture.
#[derive(Clone, Copy)]
pub(super) struct Names {
    /// The part in a decoder layer.
    pub(super) module: &'static str,
    /// The router in the part.
    pub(super) router: &'static str,
    /// An expert's projections, and what they compute.
    pub(super) matrices: &'static [(&'static str, Role)],
    /// The part, and the router in it, as transformers 5 has them in memory.
    pub(super) in_memory: [&'static str; 2],
}

impl Names {
    /// The names of most families.
    pub(super) const fn mlp() -> Self {
        Self {
            module: "mlp",
            router: "gate",
            matrices: &[
                ("gate_proj", Role::Gate),
                ("up_proj", Role::Up),
                ("down_proj", Role::Down),
            ],
            in_memory: ["mlp", "gate"],
        }
    }
}

/// The shared expert of each layer.
pub(super) struct Shared {
    /// Name in the part.
    pub(super) name: &'static str,
    /// Name of its gate in the part, if it has one.
    pub(super) gate: Option<&'static str>,
    /// Number of inner channels.
    pub(super) width: usize,
}

/// The keys of a `config.json` that describe experts, with their defaults.
pub(super) struct Keys {
    /// The keys of the number of experts of a layer; the first that the configuration has counts.
    pub(super) count: (&'static [&'static str], usize),
    /// Number of experts of each token.
    pub(super) active: usize,
    /// The key of the number of inner channels of an expert.
    pub(super) width: (&'static str, Option<usize>),
}

impl Scoring {
    /// The scoring that `norm_topk_prob` says.
    pub(super) fn of(config: &Object<'_>) -> Result<Self, Error> {
        Ok(Self::softmax(config.boolean("norm_topk_prob")?.unwrap_or(false)))
    }
}

impl Experts {
    /// The experts that a `config.json` describes, in all layers.
    pub(super) fn read(
        config: &Object<'_>,
        names: Names,
        keys: &Keys,
        scoring: Scoring,
    ) -> Result<Self, Error> {
        let (count_keys, default) = keys.count;
        let key = count_keys.iter().find(|key| config.has(key)).unwrap_or(&count_keys[0]);
        let count = config.size(key)?.unwrap_or(default);
        if let Some(layers) = config.layers("num_hidden_layers")?
            && layers.saturating_mul(count) > EXPERTS
        {
            let problem = format!("with {layers} layers that is too many");
            return Err(config.invalid(key, count, problem));
        }
        let active = config.size("num_experts_per_tok")?.unwrap_or(keys.active);
        if active > count {
            let problem = format!("it must be at most `{key}`, {count}");
            return Err(config.invalid("num_experts_per_tok", active, problem));
        }
        let (key, default) = keys.width;
        let width = config.size(key)?.or(default).ok_or_else(|| config.missing(key))?;
        let (correction, bias, step, dense, shared) = (None, false, 1, Vec::new(), None);
        Ok(Self { names, count, active, width, scoring, correction, bias, step, dense, shared })
    }

    /// Whether a layer has experts.
    pub(super) fn are_in(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.step) && !self.dense.contains(&(layer as f64))
    }

    /// The router and the projections of the decoder layer whose tensor names start with `layer`.
    pub(super) fn part(&self, layer: &str, hidden: usize) -> (Router, Vec<Projection>) {
        let Self { names, count, active, width, scoring, bias, .. } = *self;
        let module = names.module;
        let matrices = |expert: Option<usize>, within: String, width: usize| {
            names.matrices.iter().map(move |&(name, role)| {
                let dims = match role {
                    Role::Down => (hidden, width),
                    Role::GateUp | Role::InterleavedGateUp => (2 * width, hidden),
                    _ => (width, hidden),
                };
                let name = format!("{within}.{name}");
                Projection { expert, ..projection(layer, &name, role, dims, bias) }
            })
        };
        let experts =
            (0..count).flat_map(|i| matrices(Some(i), format!("{module}.experts.{i}"), width));
        let shared = self.shared.iter();
        let shared =
            shared.flat_map(|of| matrices(None, format!("{module}.{}", of.name), of.width));
        let all = experts.chain(shared).collect();
        let shared_gate = self.shared.as_ref().and_then(|shared| shared.gate).map(|gate| {
            let name = format!("{module}.{gate}");
            projection(layer, &name, Role::Router, (1, hidden), false)
        });
        let name = format!("{module}.{}", names.router);
        let router = Router {
            projection: projection(layer, &name, Role::Router, (count, hidden), bias),
            active,
            scoring,
            shared_gate,
            correction: self.correction.map(|of| format!("{layer}.{name}.{of}")),
            experts: format!("{layer}.{module}.experts"),
            in_memory: names.in_memory,
        };
        (router, all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Decoder, Error, Part, decoder};

    fn with(keys: Value) -> Result<Decoder, Error> {
        let mut config = json!({
            "model_type": "qwen3_moe", "vocab_size": 96, "hidden_size": 32,
            "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6,
            "num_experts_per_tok": 2,
        });
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        decoder(&config)
    }

    #[test]
    fn layers_have_experts_or_an_mlp() {
        let experts = |decoder: &Decoder| -> Vec<usize> {
            decoder.layers.iter().map(|layer| layer.mlp.experts()).collect()
        };
        assert_eq!(experts(&with(json!({})).unwrap()), [6; 4]);
        assert_eq!(experts(&with(json!({"decoder_sparse_step": 2})).unwrap()), [0, 6, 0, 6]);
        let some = with(json!({"mlp_only_layers": [0, 2]})).unwrap();
        assert_eq!(experts(&some), [0, 6, 0, 6]);
        let [dense, mixed] = [0, 1].map(|i| some.layers[i].projections(Part::Mlp));
        assert_eq!(dense[2].weight, "model.layers.0.mlp.down_proj.weight");
        assert_eq!(mixed.len(), 18);
        assert_eq!(mixed[17].weight, "model.layers.1.mlp.experts.5.down_proj.weight");
        assert_eq!((mixed[17].dims.rows, mixed[17].dims.columns), (32, 16));
        let router = some.layers[1].mlp.router.as_ref().unwrap();
        assert_eq!(router.projection.weight, "model.layers.1.mlp.gate.weight");
        assert_eq!((router.projection.dims.rows, router.active), (6, 2));
    }

    #[test]
    fn absurd_numbers_are_refused() {
        for (keys, message) in [
            (json!({"num_experts": 0}), "`num_experts` is 0"),
            (json!({"num_experts": 2_000_000}), "with 4 layers that is too many"),
            (json!({"num_experts_per_tok": 7}), "it must be at most `num_experts`, 6"),
            (json!({"num_experts_per_tok": 0}), "`num_experts_per_tok` is 0"),
            (json!({"moe_intermediate_size": -1}), "`moe_intermediate_size` is -1"),
            (json!({"decoder_sparse_step": 0}), "`decoder_sparse_step` is 0"),
            (json!({"mlp_only_layers": 3}), "`mlp_only_layers` must be a list of numbers"),
        ] {
            let error = with(keys).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
