use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    checkpoint::Masks,
    family::{self, Decoder},
    mask::floored,
    plan::Plan,
    random::SplitMix64,
};

fn removal(wanted: &[(&str, f64)], config: &Value) -> Result<(Decoder, Option<Removal>), Error> {
    let decoder = family::decoder(config).unwrap();
    let of = |(name, ratio): &(&str, f64)| {
        Lost::new(Structure::named(name).unwrap(), &decoder, *ratio, 1)
    };
    let lost = wanted.iter().filter_map(|wanted| of(wanted).transpose());
    let removal = Removal::new(lost.collect::<Result<_, _>>()?, config)?;
    Ok((decoder, removal))
}

/// Masks the structures with the lowest of random scores of weights.
fn choose(removal: &Removal, decoder: &Decoder, seed: u64) -> Masks {
    let (mut random, mut masks) = (SplitMix64::new(seed), Masks::new());
    let mut scores = Scores::new(removal);
    for (layer, of) in decoder.layers.iter().enumerate() {
        for part in Part::ALL {
            for (linear, of) in of.projections(part).iter().enumerate() {
                if scores.wants(layer, part, linear) {
                    let own: Vec<f32> =
                        (0..of.dims.len()).map(|_| random.below(5) as f32).collect();
                    scores.add((layer, part, linear), of.dims, &own);
                }
            }
            let place = (layer, part);
            scores.end_part(place, decoder, &mut masks, |_, _| Ok::<_, ()>(())).unwrap();
        }
    }
    masks
}

/// Checks that masks, smaller tensors, the smaller configuration and a report say the same.
fn consistent(removal: &Removal, decoder: &Decoder, config: &Value, masks: &Masks) {
    let cuts = removal.cuts(decoder, masks);
    let read = family::decoder(&cuts.config).unwrap();
    let left: Vec<_> = decoder
        .tensors()
        .filter_map(|(name, shape)| {
            Some((cuts.name(name)?, name, cuts.shape(name, &shape).to_vec()))
        })
        .collect();
    assert_eq!(left.len(), read.tensors().count());
    for ((name, dense_name, shape), (read_name, read_shape)) in left.iter().zip(read.tensors()) {
        assert_eq!((&**name, shape), (read_name, &read_shape));
        assert_eq!(cuts.dense_name(name).as_deref(), Some(*dense_name));
        if let Some(mask) = masks.get(*dense_name) {
            assert_eq!(mask.kept(), shape.iter().product::<usize>(), "{dense_name}");
        }
    }
    for (name, mask) in masks.iter().filter(|(name, _)| cuts.name(name).is_none()) {
        assert_eq!(mask.kept(), 0, "{name}");
    }
    let gone = removal.gone(decoder, masks);
    let gone: Vec<_> = removal
        .lost
        .iter()
        .zip(&gone)
        .map(|(lost, gone)| (lost.structure, &gone[..], false))
        .collect();
    let again = Removal::reported(&gone, decoder, config);
    assert!(again == Ok(Some((removal.clone(), masks.clone()))));
}

fn llama(layers: usize) -> Value {
    json!({
        "model_type": "llama", "vocab_size": 8, "hidden_size": 6, "num_hidden_layers": layers,
        "intermediate_size": 9, "head_dim": 4, "attention_bias": true,
        "num_attention_heads": 6, "num_key_value_heads": 3,
    })
}

fn mixture(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 8, "hidden_size": 6, "num_hidden_layers": 4,
        "intermediate_size": 9, "moe_intermediate_size": 5, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    })
}

proptest! {
    /// Each layer loses as many structures as the plan says.
    #[test]
    fn layers_lose_alike(
        (kv_heads, queries, head_dim) in (2_usize..5, 1_usize..4, 1_usize..4),
        inner in 2_usize..20,
        ratio in 0.3..0.9_f64,
        seed: u64,
    ) {
        let mut config = llama(2);
        for (key, value) in [
            ("intermediate_size", inner),
            ("head_dim", 2 * head_dim),
            ("num_attention_heads", kv_heads * queries),
            ("num_key_value_heads", kv_heads),
        ] {
            config[key] = value.into();
        }
        for (structure, of) in [("channels", inner), ("heads", kv_heads)] {
            let found = removal(&[(structure, ratio)], &config);
            if floored(ratio, of) == 0 {
                let is_ratio = matches!(found, Err(Error::Ratio { removed: 0, .. }));
                prop_assert!(is_ratio);
                continue;
            }
            let (decoder, removal) = found.unwrap();
            let removal = removal.unwrap();
            let lost = &removal.lost[0];
            prop_assert_eq!((lost.of, lost.removed), (of, floored(ratio, of)));
            let masks = choose(&removal, &decoder, seed);
            consistent(&removal, &decoder, &config, &masks);
            for gone in &removal.gone(&decoder, &masks)[0] {
                prop_assert_eq!(gone.below(of).count(), lost.removed);
            }
            let pruned: usize = masks.values().map(|of| of.dims().len() - of.kept()).sum();
            let all: usize = masks.values().map(|of| of.dims().len()).sum();
            let plan = Plan::of_structures(&decoder, removal).unwrap();
            prop_assert_eq!(plan.weights(&decoder), [all, pruned]);
        }
    }

    /// Structures with the lowest scores go; of equal ones the first.
    #[test]
    fn the_lowest_go(seed: u64) {
        let config = llama(1);
        let (decoder, removal) = removal(&[("channels", 0.5)], &config).unwrap();
        let removal = removal.unwrap();
        let (mut random, mut masks) = (SplitMix64::new(seed), Masks::new());
        let given: Vec<f64> = (0..9).map(|_| random.below(4) as f64).collect();
        let mut scores = Scores::new(&removal);
        let set = |_: &Lost, scores: &mut [f64]| {
            scores.copy_from_slice(&given);
            Ok::<_, ()>(())
        };
        scores.end_part((0, Part::Mlp), &decoder, &mut masks, set).unwrap();
        let gone: Vec<usize> = removal.gone(&decoder, &masks)[0][0].below(9).collect();
        prop_assert_eq!(gone.len(), 4);
        for kept in (0..9).filter(|i| !gone.contains(i)) {
            prop_assert!(gone.iter().all(|lost| (given[*lost], *lost) < (given[kept], kept)));
        }
    }

    #[test]
    fn all_kinds_go_together(seed: u64) {
        let config = llama(5);
        let kinds = [("layers", 0.4), ("channels", 0.4), ("heads", 0.4)];
        let (decoder, removal) = removal(&kinds, &config).unwrap();
        let removal = removal.unwrap();
        let masks = choose(&removal, &decoder, seed);
        consistent(&removal, &decoder, &config, &masks);
        let cuts = removal.cuts(&decoder, &masks);
        for (key, left) in [
            ("num_hidden_layers", 3),
            ("intermediate_size", 6),
            ("num_key_value_heads", 2),
            ("num_attention_heads", 4),
        ] {
            prop_assert_eq!(&cuts.config[key], left);
        }
    }

    #[test]
    fn layers_and_experts_go_with_what_is_numbered(seed: u64) {
        for (model_type, count) in [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")] {
            let mut config = mixture(model_type);
            config[count] = 6.into();
            for (kinds, layers, experts) in [
                (&[("experts", 0.5)][..], 4, 3),
                (&[("layers", 0.25)], 3, 6),
                (&[("layers", 0.5), ("experts", 0.34), ("heads", 0.5)], 2, 4),
            ] {
                let (decoder, removal) = removal(kinds, &config).unwrap();
                let removal = removal.unwrap();
                let masks = choose(&removal, &decoder, seed);
                consistent(&removal, &decoder, &config, &masks);
                let stacked = decoder.stacked();
                let masks = choose(&removal_of(kinds, &stacked, &config), &stacked, seed);
                let cuts = removal_of(kinds, &stacked, &config).cuts(&stacked, &masks);
                prop_assert_eq!(&cuts.config["num_hidden_layers"], layers);
                prop_assert_eq!(&cuts.config[count], experts);
            }
        }
    }
}

fn removal_of(kinds: &[(&str, f64)], decoder: &Decoder, config: &Value) -> Removal {
    let of = |(name, ratio): &(&str, f64)| {
        Lost::new(Structure::named(name).unwrap(), decoder, *ratio, 1).unwrap().unwrap()
    };
    Removal::new(kinds.iter().map(of).collect(), config).unwrap().unwrap()
}

#[test]
fn exchanges_raise_the_sum_of_kept_scores() {
    let (decoder, removal) = removal(&[("channels", 0.5)], &llama(1)).unwrap();
    let removal = removal.unwrap();
    let mut masks = Masks::new();
    let mut first = Scores::new(&removal);
    first.end_part((0, Part::Mlp), &decoder, &mut masks, |_, _| Ok::<_, ()>(())).unwrap();
    let gone = |masks: &Masks| removal.gone(&decoder, masks)[0][0].to_string();
    // Of equal scores the first four of nine went.
    assert_eq!(gone(&masks), "0-3");
    let mut scores = Scores::new(&removal);
    let down = &decoder.layers[0].mlp.projections[2];
    let own = [5.0, 1.0, 9.0, 0.0, 4.0, 2.0, 7.0, 3.0, 8.0];
    let all: Vec<f32> = own.repeat(down.dims.rows);
    scores.add((0, Part::Mlp, 2), down.dims, &all);
    // 9 for 2 and 5 for 3 are worthwhile, 1 for 4 is not.
    for (alpha, expected) in [(0.4, "0-3"), (0.5, "0-1, 3, 5"), (1.0, "1, 3, 5, 7")] {
        let mut tried = masks.clone();
        scores.exchange((0, Part::Mlp), &decoder, &mut tried, alpha);
        assert_eq!(gone(&tried), expected);
        scores.exchange((0, Part::Attention), &decoder, &mut tried, 1.0);
        assert_eq!(gone(&tried), expected);
    }
}

#[test]
fn a_multiple_of_channels_is_left() {
    let decoder = family::decoder(&llama(1)).unwrap();
    let removed = |name: &str, ratio, multiple| {
        let lost = Lost::new(Structure::named(name).unwrap(), &decoder, ratio, multiple);
        lost.map(|lost| lost.map(|lost| lost.removed))
    };
    // Of nine channels.
    assert_eq!(removed("channels", 0.4, 1), Ok(Some(3)));
    assert_eq!(removed("channels", 0.4, 4), Ok(Some(1)));
    assert_eq!(removed("channels", 0.6, 4), Ok(Some(5)));
    assert!(removed("channels", 0.6, 16).is_err());
    assert_eq!(removed("heads", 0.4, 4), Ok(Some(1)));
}

#[test]
fn single_weights_are_no_structures() {
    let config = json!({
        "model_type": "opt", "vocab_size": 8, "hidden_size": 6, "ffn_dim": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    });
    assert_eq!(removal(&[("weights", 0.5)], &config).unwrap().1, None);
    let (decoder, channels) = removal(&[("channels", 0.5)], &config).unwrap();
    assert_eq!(channels.unwrap().smallest(&decoder).config["ffn_dim"], 2);
    let error = removal(&[("heads", 0.5)], &config).unwrap_err().to_string();
    let expected = "the family's config.json cannot describe a model with fewer key/value heads: \
                    with the new sizes, `model.decoder.layers.0.self_attn.q_proj.weight` would \
                    have the shape [6, 6], not [3, 6]";
    assert_eq!(error, expected);
}

#[test]
fn layers_keep_their_windows_and_positions() {
    // Which layers have windows follows from their numbers, unless they are listed.
    let gemma = json!({
        "model_type": "gemma2", "vocab_size": 8, "hidden_size": 6, "num_hidden_layers": 4,
        "intermediate_size": 9, "head_dim": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "sliding_window": 8,
    });
    let (decoder, found) = removal(&[("layers", 0.25)], &gemma).unwrap();
    let found = found.unwrap();
    for seed in 0..8 {
        let masks = choose(&found, &decoder, seed);
        consistent(&found, &decoder, &gemma, &masks);
        let gone = found.gone(&decoder, &masks)[0][0].below(4).next().unwrap();
        let mut types = ["sliding_attention", "full_attention"].repeat(2);
        types.remove(gone);
        assert_eq!(found.cuts(&decoder, &masks).config["layer_types"], json!(types));
    }
    // So does which layers have a dense MLP.
    let mut dense = mixture("qwen3_moe");
    dense["num_experts"] = 4.into();
    dense["mlp_only_layers"] = json!([1, 3]);
    let (decoder, found) = removal(&[("layers", 0.5)], &dense).unwrap();
    let found = found.unwrap();
    (0..8).for_each(|seed| consistent(&found, &decoder, &dense, &choose(&found, &decoder, seed)));
    dense["decoder_sparse_step"] = 2.into();
    dense["mlp_only_layers"] = json!([]);
    let error = removal(&[("layers", 0.5)], &dense).unwrap_err().to_string();
    assert!(error.contains("cannot describe a model with fewer layers: `model.layers."), "{error}");
    // Of an MLP that is no mixture no experts go.
    let (decoder, found) = removal(&[("experts", 0.5)], &dense).unwrap();
    assert!(found.unwrap().smallest(&decoder).name("model.layers.0.mlp.up_proj.weight").is_some());
}

#[test]
fn what_a_model_cannot_lose_is_said() {
    let why =
        |kinds: &[(&str, f64)], config: &Value| removal(kinds, config).unwrap_err().to_string();
    let llama = llama(3);
    assert_eq!(why(&[("experts", 0.5)], &llama), "the model has no experts");
    let mut one_head = llama.clone();
    one_head["num_key_value_heads"] = 1.into();
    let found = why(&[("heads", 0.5)], &one_head);
    assert!(found.ends_with("heads of a layer, rounded down, is 0: nothing would be removed"));
    let found = why(&[("layers", 0.3)], &llama);
    assert_eq!(found, "0.3 of the 3 layers, rounded down, is 0: nothing would be removed");
    let mut experts = mixture("mixtral");
    experts["num_local_experts"] = 6.into();
    let found = why(&[("experts", 0.9)], &experts);
    assert!(found.ends_with("is 5: a token would have more experts than are left"), "{found}");
    assert!(removal(&[("experts", 0.67)], &experts).is_ok());
    let mut grouped = mixture("deepseek_v3");
    for (key, value) in
        [("n_routed_experts", 8), ("n_group", 2), ("topk_group", 1), ("first_k_dense_replace", 1)]
    {
        grouped[key] = value.into();
    }
    let found = why(&[("experts", 0.5)], &grouped);
    assert!(found.contains("its router chooses groups of experts"), "{found}");
    grouped["n_group"] = 1.into();
    let (decoder, found) = removal(&[("experts", 0.5), ("layers", 0.5)], &grouped).unwrap();
    let found = found.unwrap();
    (0..8).for_each(|seed| consistent(&found, &decoder, &grouped, &choose(&found, &decoder, seed)));
}
