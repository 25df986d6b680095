//! Links the metrics that come with Barber. Without a mention, the linker would drop them and the
//! registry would not find them.

use barber_activation_norm as _;
use barber_block_influence as _;
use barber_block_influence as _;
use barber_expert_contribution as _;
use barber_expert_contribution as _;
use barber_fluctuation as _;
use barber_fluctuation as _;
use barber_gradient as _;
use barber_hessian_diagonal as _;
use barber_magnitude as _;
use barber_normalise as _;
use barber_random as _;
use barber_ria as _;
use barber_weight_gradient as _;
