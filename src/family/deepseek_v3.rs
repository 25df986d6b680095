//! DeepSeek V3 and R1 (arXiv 2412.19437): latent attention, and from some layer on a mixture of
//! experts with a shared one, chosen by sigmoids in groups.

use super::{
    Decoder, Family, Groups, Score, Scoring,
    config::{Error, MOST, Object},
    experts::{Experts, Keys, Names, Shared},
    rms::{LatentWidths, Style},
    rope,
};

pub(super) const FAMILY: Family = Family {
    model_type: "deepseek_v3",
    doc: "DeepSeek V3 and R1, Moonlight: latent attention, a mixture of experts, one of them shared",
    decoder,
};

/// The defaults are those of transformers' `DeepseekV3Config`.
fn decoder(config: &Object<'_>) -> Result<Decoder, Error> {
    let size = |key, default| Ok::<_, Error>(config.size(key)?.unwrap_or(default));
    let keys = Keys {
        count: (&["n_routed_experts", "num_local_experts"], 256),
        active: 8,
        width: ("moe_intermediate_size", Some(2048)),
    };
    let scoring = Scoring {
        score: Score::Sigmoid,
        normalised: config.boolean("norm_topk_prob")?.unwrap_or(true),
        scale: config.above("routed_scaling_factor", 0.0)?.unwrap_or(2.5) as f32,
        groups: None,
    };
    let experts = Experts::read(config, Names::mlp(), &keys, scoring)?;
    let groups = groups(config, &experts)?;
    let (key, shared) = ("n_shared_experts", size("n_shared_experts", 1)?);
    let shared_width = shared.checked_mul(experts.width).filter(|width| *width <= MOST);
    let shared_width = shared_width.ok_or_else(|| {
        config.invalid(key, shared, "with `moe_intermediate_size` that is too many")
    })?;
    let first = config.number("first_k_dense_replace")?.unwrap_or(3.0);
    let layers = config.layers("num_hidden_layers")?.unwrap_or(0);
    let experts = Experts {
        scoring: Scoring { groups: Some(groups), ..scoring },
        correction: Some("e_score_correction_bias"),
        dense: (0..layers).map(|layer| layer as f64).filter(|layer| *layer < first).collect(),
        shared: Some(Shared { name: "shared_experts", gate: None, width: shared_width }),
        ..experts
    };
    let latent = LatentWidths {
        queries: config.size_or("q_lora_rank", Some(1536))?,
        keys_and_values: size("kv_lora_rank", 512)?,
        plain: size("qk_nope_head_dim", 128)?,
        rotated: (size("qk_rope_head_dim", 64)?, "qk_rope_head_dim"),
        value: size("v_head_dim", 128)?,
    };
    let width = (latent.plain + latent.rotated.0) as f64;
    let biased = config.boolean("attention_bias")?.unwrap_or(false);
    let style = Style {
        qkv_bias: biased,
        output_bias: biased,
        latent: Some(latent),
        score_scale: Some((rope::score_factor(config)? / width.sqrt()) as f32),
        experts: Some(experts),
        rope: rope::Style {
            max_positions: 4096,
            interleaved: config.boolean("rope_interleave")?.unwrap_or(true),
            ..rope::Style::llama()
        },
        ..Style::llama()
    };
    style.decoder(config, |_| None)
}

/// The groups of experts, which must have at least two experts each.
fn groups(config: &Object<'_>, experts: &Experts) -> Result<Groups, Error> {
    let size = |key, default| Ok::<_, Error>(config.size(key)?.unwrap_or(default));
    let (count, active) = (size("n_group", 8)?, size("topk_group", 4)?);
    let all = experts.count;
    if !all.is_multiple_of(count) || all / count < 2 {
        let problem = format!("it must divide `n_routed_experts`, {all}, in groups of two or more");
        return Err(config.invalid("n_group", count, problem));
    }
    if active > count || active * (all / count) < experts.active {
        let problem = format!(
            "it must be at most `n_group`, {count}, and have room for `num_experts_per_tok`, {}",
            experts.active
        );
        return Err(config.invalid("topk_group", active, problem));
    }
    Ok(Groups { count, active })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Decoder, Error, Inner, decoder};

    fn with(keys: Value) -> Result<Decoder, Error> {
        let mut config = json!({
            "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        decoder(&config)
    }

    #[test]
    fn heads_have_plain_and_rotated_channels() {
        let yarn = json!({
            "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        });
        let found = with(json!({"rope_scaling": yarn})).unwrap();
        let experts: Vec<_> = found.layers.iter().map(|layer| layer.mlp.experts()).collect();
        assert_eq!(experts, [0, 0, 0, 256]);
        let Inner::Attention(attention) = &found.layers[0].attention.inner else { panic!() };
        assert_eq!((attention.head_dim, attention.value_dim, attention.kv_heads), (192, 128, 4));
        // Of DeepSeek V3: (0.1 ln 40 + 1)² / √192.
        assert!((attention.scale - 0.135_23).abs() < 1e-5, "{}", attention.scale);
        assert_eq!(found.ropes[0].head_dim, 64);
        let shape = |name: &str| found.tensors().find(|(of, _)| *of == name).map(|of| of.1);
        let of = |name: &str| shape(&format!("model.layers.3.{name}"));
        assert_eq!(of("self_attn.q_b_proj.weight"), Some(vec![4 * 192, 1536]));
        assert_eq!(of("self_attn.kv_a_proj_with_mqa.weight"), Some(vec![512 + 64, 32]));
        assert_eq!(of("self_attn.kv_b_proj.weight"), Some(vec![4 * 256, 512]));
        assert_eq!(of("self_attn.o_proj.weight"), Some(vec![32, 4 * 128]));
        assert_eq!(of("mlp.gate.e_score_correction_bias"), Some(vec![256]));
    }

    #[test]
    fn absurd_numbers_are_refused() {
        for (keys, message) in [
            (json!({"n_group": 3}), "`n_group` is 3, but it must divide"),
            (json!({"n_group": 256}), "`n_group` is 256"),
            (json!({"topk_group": 9}), "`topk_group` is 9"),
            (json!({"topk_group": 1, "num_experts_per_tok": 33}), "`num_experts_per_tok`, 33"),
            (json!({"qk_rope_head_dim": 3}), "rotary positions need an even number"),
            (json!({"qk_nope_head_dim": 2_000_000_000}), "that is too many"),
            (json!({"n_shared_experts": 2_000_000_000}), "`n_shared_experts` is 2000000000"),
            (json!({"q_lora_rank": 0}), "`q_lora_rank` is 0"),
        ] {
            let error = with(keys).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
