//! Serves a [`VirtioDevice`](crate::VirtioDevice) over vhost-user.
