//! Experts of a mixture, with their rows of the router. A token still has as many experts.

use super::{Decoder, Error, Kind, Owners, Part, Site, Slice, Whole, channels::left, config::set};

pub(super) static EXPERTS: Kind = Kind {
    name: "experts",
    help: "experts of the layers' mixtures, with their rows of the routers: the result is a smaller \
           dense model",
    whole: Some(Whole {
        many: "experts",
        is_of_model: false,
        has_multiples: false,
        leaves_inputs: false,
        sites,
        configure: |config, _, kept| {
            set(config, &["num_experts", "num_local_experts", "n_routed_experts"], left(kept));
        },
    }),
};

fn sites(decoder: &Decoder) -> Result<Vec<Site>, Error> {
    let mut sites = Vec::new();
    for (layer, of) in decoder.layers.iter().enumerate() {
        let Some(router) = &of.mlp.router else { continue };
        if router.scoring.groups.is_some_and(|groups| groups.count > 1) {
            let why = "its router chooses groups of experts, which would no longer be as large";
            return Err(Error::Lacks { layer, why });
        }
        let own = of.mlp.projections.iter().enumerate();
        let own = own.filter_map(|(linear, of)| Some((linear, of.expert?)));
        let slices = own.map(|(linear, expert)| {
            let owners = Owners::Whole(expert);
            Slice { layer, part: Part::Mlp, linear, owners }
        });
        let projection = &router.projection;
        let rows = projection.bias.iter().chain(&router.correction).chain([&projection.weight]);
        sites.push(Site {
            count: projection.dims.rows,
            slices: slices.collect(),
            rows: rows.cloned().collect(),
            numbered: Some(format!("{}.", router.experts)),
        });
    }
    Ok(sites)
}
