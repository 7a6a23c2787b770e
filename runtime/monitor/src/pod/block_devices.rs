//! Block devices of the host in the VM: each is a segment of the pod's disk, of one container's.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use podvisor_monitor::fd_table::FdTable;
use podvisor_proto::{agent, monitor};
use podvisor_vmm::{Access, SegmentError, SegmentMap};
use thiserror::Error;

/// Why a block device cannot be mapped.
#[derive(Debug, Error)]
pub enum BlockDeviceError {
    /// It came without its file.
    #[error("no file came for the block device {0}")]
    NoFile(String),
    /// The disk refuses.
    #[error("block device {path}: {source}")]
    Disk {
        /// In the container.
        path: String,
        /// Why.
        source: SegmentError,
    },
}

/// The block devices on the pod's disk. As with layers, a segment is unmapped only when the agent has let go of it.
pub struct BlockDevices {
    disk: SegmentMap,
    /// Where they begin.
    mapped: Mutex<HashSet<u64>>,
}

impl BlockDevices {
    /// None on `disk` yet.
    pub fn new(disk: SegmentMap) -> Self {
        Self {
            disk,
            mapped: Mutex::default(),
        }
    }

    /// Maps a container's devices.
    ///
    /// # Errors
    /// See [`BlockDeviceError`]; nothing is mapped then.
    pub fn map(
        &self,
        devices: &[monitor::BlockDevice],
        fds: &FdTable,
    ) -> Result<Vec<agent::BlockDevice>, BlockDeviceError> {
        let mut added: Vec<agent::BlockDevice> = Vec::with_capacity(devices.len());
        for device in devices {
            match self.map_one(device, fds) {
                Ok(device) => added.push(device),
                Err(error) => {
                    // The guest has not heard of these.
                    let segments: Vec<_> = added.into_iter().filter_map(|d| d.segment).collect();
                    self.unmap(&segments);
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    /// Unmaps those of `released` that are block devices.
    pub fn unmap(&self, released: &[agent::Segment]) {
        for segment in released {
            let ours = self
                .mapped
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&segment.start);
            if ours && let Err(error) = self.disk.remove(segment.start) {
                tracing::error!(%error, "the disk's map and the block devices disagree");
            }
        }
    }

    fn map_one(
        &self,
        device: &monitor::BlockDevice,
        fds: &FdTable,
    ) -> Result<agent::BlockDevice, BlockDeviceError> {
        let path = || device.path.clone();
        let file = fds.take(&device.fd_token);
        let file = file.ok_or_else(|| BlockDeviceError::NoFile(path()))?;
        let access = if device.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let segment = self.disk.insert(file, 0, device.length, access);
        let segment = segment.map_err(|source| BlockDeviceError::Disk {
            path: path(),
            source,
        })?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.insert(segment.start);
        Ok(agent::BlockDevice {
            segment: Some(agent::Segment {
                start: segment.start,
                length: segment.length,
            }),
            path: path(),
            read_only: device.read_only,
        })
    }
}
