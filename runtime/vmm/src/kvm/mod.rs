//! KVM in this process. So far: [`probe`], whether the host's KVM can run a stock kernel at all.

pub mod probe;
