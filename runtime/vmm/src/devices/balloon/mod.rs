//! Memory that the guest does not use, back to the host: virtio-balloon with free page reporting.
//!
//! - `device`: the virtio device
//! - `pages`: the page numbers that the driver puts into the balloon
//! - `handle`: [`BalloonHandle`], by which the rest of the process asks the guest for memory
//!
//! With free page reporting the guest tells of larger free ranges by itself, some seconds after they became free; it
//! takes them back by using them. The balloon is for when the host wants more than that. Either way the pages leave the
//! host at once (`buffers::release`) and come back, empty, when the guest touches them: so nothing is to be done when
//! the balloon shrinks, and a driver that lies costs only its own guest.

mod device;
mod handle;
mod pages;

pub use device::BalloonDevice;
pub use handle::BalloonHandle;
