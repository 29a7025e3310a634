//! A device that leaves a group and joins another, and its end.

use super::device::CudaDevice;
use super::group::Group;
use crate::collective::Collective;
use crate::device::{RankDevice, Result};

impl RankDevice for CudaDevice {
    fn leave_group(&mut self) -> Result<()> {
        // With it ends what waits for other ranks.
        self.group.get_mut().take();
        self.graphs.clear();
        self.gpu.synchronize()
    }

    fn join_group(&mut self, collective: Box<dyn Collective>) -> Result<()> {
        *self.group.get_mut() = Some(Group::new(&self.gpu, collective, self.ways, self.exchange.as_ref())?);
        self.warm_up_sums()
    }

    fn verify_weights(&self) -> Result<()> {
        self.verify_kept()
    }

    fn used_workspace_bytes(&self) -> usize {
        self.arena.used_bytes()
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // What waits for other ranks ends with the group, and then nothing is under way that needs a kernel or a buffer.
        self.group.get_mut().take();
        self.graphs.clear();
        let _ = self.gpu.synchronize();
    }
}
