//! Linear assignment: of `n` things and `n` places, each thing gets a place of its own, at the least
//! sum of costs. The algorithm is the one of shortest augmenting paths, with a price for each thing and
//! place (Jonker and Volgenant, Computing 38, 1987); it takes O(n³) operations.

/// The place of each thing, given `cost`, row-major, a row for each thing.
pub(super) fn assign(n: usize, cost: &[f32]) -> Vec<usize> {
    let at = |thing: usize, place: usize| f64::from(cost[thing * n + place]);
    let (mut of_thing, mut of_place) = (vec![0.0; n], vec![0.0; n]);
    let mut owner: Vec<Option<usize>> = vec![None; n];
    for new in 0..n {
        // The shortest path from the new thing to each place, through places that have an owner.
        let mut distance = vec![f64::INFINITY; n];
        let mut before = vec![None; n];
        let mut settled = vec![false; n];
        let (mut thing, mut last, mut length) = (new, None, 0.0);
        let free = loop {
            let mut nearest = None;
            for place in (0..n).filter(|place| !settled[*place]) {
                let through = length + at(thing, place) - of_thing[thing] - of_place[place];
                if through < distance[place] {
                    (distance[place], before[place]) = (through, last);
                }
                if nearest.is_none_or(|of: usize| distance[place] < distance[of]) {
                    nearest = Some(place);
                }
            }
            let Some(place) = nearest else { break None };
            (settled[place], length, last) = (true, distance[place], Some(place));
            match owner[place] {
                None => break Some(place),
                Some(next) => thing = next,
            }
        };
        // The prices that keep the costs of all assigned pairs zero, and no cost below it.
        of_thing[new] += length;
        for place in (0..n).filter(|place| settled[*place]) {
            let more = length - distance[place];
            of_place[place] -= more;
            if let Some(thing) = owner[place] {
                of_thing[thing] += more;
            }
        }
        // Along the path, each place goes to the owner of the one before it.
        let mut place = free;
        while let Some(at) = place {
            place = before[at];
            owner[at] = place.map_or(Some(new), |before| owner[before]);
        }
    }
    let mut places = vec![0; n];
    for (place, thing) in owner.into_iter().enumerate() {
        thing.into_iter().for_each(|thing| places[thing] = place);
    }
    places
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// The least cost of giving the things from `thing` on the places that are not `taken`.
    fn least(n: usize, cost: &[f32], thing: usize, taken: usize) -> f32 {
        if thing == n {
            return 0.0;
        }
        let free = (0..n).filter(|place| taken >> place & 1 == 0);
        let costs = free
            .map(|place| cost[thing * n + place] + least(n, cost, thing + 1, taken | 1 << place));
        costs.fold(f32::INFINITY, f32::min)
    }

    proptest! {
        #[test]
        fn no_assignment_costs_less(n in 0_usize..7, costs in vec(-20_i8..20, 49)) {
            let cost: Vec<f32> = costs[..n * n].iter().map(|cost| f32::from(*cost)).collect();
            let places = assign(n, &cost);
            let mut sorted = places.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..n));
            let found: f32 = places.iter().enumerate().map(|(i, place)| cost[i * n + place]).sum();
            prop_assert_eq!(found, least(n, &cost, 0, 0));
        }
    }
}
