use std::{fs, path::Path, slice::from_ref};

use dfdx::tensor::Cpu;
use proptest::prelude::*;

use super::*;
use crate::{
    checkpoint::{Pruned, Reader},
    executor::{Outputs, PartWeights, Pass, Targets},
    model::Model,
    random::SplitMix64,
};

/// A random order of a site's channels.
fn random_order(site: &Site, random: &mut SplitMix64) -> Order {
    let mut order: Vec<usize> = (0..site.slices[0].places().len()).collect();
    for group in order.chunks_mut(site.count) {
        (1..group.len()).rev().for_each(|i| group.swap(i, random.below(i + 1)));
    }
    Order(order)
}

/// The orders of all inner channels of a model, drawn at random.
fn random_orders(decoder: &Decoder, seed: u64) -> BTreeMap<String, Order> {
    let mut random = SplitMix64::new(seed);
    let parts = decoder.layers.iter().flat_map(|layer| Part::ALL.map(|part| layer.part(part)));
    let sites = parts.flat_map(|part| Site::all(part).into_iter().map(move |site| (part, site)));
    let order = |(part, site): (&Sublayer, Site)| {
        (part.projections[site.output].weight.clone(), random_order(&site, &mut random))
    };
    sites.map(order).collect()
}

fn permuted(orders: BTreeMap<String, Order>) -> [PermutedPart; 1] {
    let (before, after) = (Loss::default(), Loss::default());
    [PermutedPart { layer: 0, part: "mlp".into(), before, after, orders }]
}

/// The relative squared errors of the outputs of all parts of a model whose weights are read in these
/// orders, given the same hidden states.
fn errors(reader: &Reader, orders: Orders) -> Vec<f64> {
    let dense = Model::new(reader, Cpu::default()).unwrap();
    let reordered = reader.reordered(orders);
    let reordered = Model::new(&reordered, Cpu::default()).unwrap();
    let ids: Vec<Vec<u32>> = vec![(0..12).map(|i| i * 5 % 64).collect()];
    let mut stream = dense.embed(&ids, 0).unwrap();
    let mut errors = Vec::new();
    for (layer, part) in (0..dense.decoder.layers.len()).flat_map(|i| Part::ALL.map(|of| (i, of))) {
        let of = |model: &Model<'_, Cpu>| -> PartWeights<Cpu> {
            model.part(layer, part, &Pruned::dense()).unwrap()
        };
        let (own, other) = (of(&dense), of(&reordered));
        let kept = Pass { outputs: Outputs::Kept, ..Pass::new(from_ref(&own), &stream) };
        let outputs = dense.executor.run(kept).unwrap().outputs;
        let targets = Targets::Relative(&outputs);
        let pass = Pass { targets, ..Pass::new(from_ref(&other), &stream) };
        errors.push(dense.executor.run(pass).unwrap().loss.calibration);
        dense.executor.run(Pass::advancing(from_ref(&own), &mut stream)).unwrap();
    }
    errors
}

/// Every family, fused, stacked, transposed and quantised weights among them.
#[test]
fn a_model_computes_the_same_in_any_order() {
    let mut checked = 0;
    for fixture in fs::read_dir("tests/fixtures/logits").unwrap() {
        let path = fixture.unwrap().path();
        let reader = Reader::open(&path).unwrap();
        let decoder = crate::model::decoder(&reader).unwrap();
        let all = orders(&decoder, &permuted(random_orders(&decoder, 1))).unwrap();
        let errors = errors(&reader, all);
        assert!(errors.iter().all(|error| *error < 1e-9), "{} {errors:?}", path.display());
        checked += 1;
    }
    assert_eq!(checked, 71);
}

#[test]
fn rows_go_with_columns() {
    for fixture in ["gqa-tied", "opt", "gpt-neox", "phi3", "mixtral", "gpt-oss", "deepseek-v3"] {
        let reader = Reader::open(&Path::new("tests/fixtures/logits").join(fixture)).unwrap();
        let decoder = crate::model::decoder(&reader).unwrap();
        let all = orders(&decoder, &permuted(random_orders(&decoder, 2))).unwrap();
        let mut experts = Vec::new();
        for name in all.keys() {
            let mut most = all.clone();
            most.remove(name);
            let zero = reader.read(name, reader.tensor(name).unwrap().shape).unwrap();
            if zero.iter().any(|x| *x != zero[0]) {
                let worst = errors(&reader, most).into_iter().fold(0.0, f64::max);
                // An expert may see no token.
                match name.contains(".experts.") {
                    true => experts.push(worst > 1e-9),
                    false => assert!(worst > 1e-9, "{fixture}: {name}"),
                }
            }
        }
        assert!(experts.is_empty() || experts.contains(&true), "{fixture}");
    }
}

/// A change of an order that makes it none.
type Wrong<'a> = &'a dyn Fn(&mut Vec<usize>);

#[test]
fn orders_of_other_channels_are_refused() {
    let reader = Reader::open(Path::new("tests/fixtures/logits/gqa-tied")).unwrap();
    let decoder = crate::model::decoder(&reader).unwrap();
    let all = random_orders(&decoder, 3);
    assert!(orders(&decoder, &permuted(all.clone())).is_ok());
    let o_proj = "model.layers.1.self_attn.o_proj.weight";
    let wrong: [Wrong<'_>; 4] = [
        &|order| order.swap(0, 8),
        &|order| order[3] = order[4],
        &|order| order[0] = 99,
        &|order| order.truncate(7),
    ];
    for wrong in wrong {
        let mut all = all.clone();
        wrong(&mut all.get_mut(o_proj).unwrap().0);
        let error = orders(&decoder, &permuted(all)).unwrap_err();
        assert_eq!(error, Error { tensor: o_proj.into() });
    }
    let tensor = "model.layers.0.mlp.up_proj.weight".to_owned();
    let other = [(tensor.clone(), Order(vec![0]))].into_iter().collect();
    assert_eq!(orders(&decoder, &permuted(other)), Err(Error { tensor }));
}

proptest! {
    #[test]
    fn orders_are_read_as_they_are_written(order in prop::collection::vec(0_usize..99, 0..20)) {
        let order = Order(order);
        prop_assert_eq!(order.to_string().parse(), Ok(order));
    }

    #[test]
    fn any_text_is_an_order_or_refused(text in "[0-9, -]{0,12}") {
        let read = text.parse::<Order>();
        prop_assert!(read.is_err() || read.is_ok_and(|of| of.0.len() <= text.len()));
    }
}
