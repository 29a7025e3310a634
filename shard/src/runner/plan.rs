//! What memory a rank will hold, known before anything is allocated.

use thiserror::Error;

/// Bytes that a rank will hold, all of them touched at start. Nothing grows later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Slices of the weights.
    pub weights_bytes: u64,
    /// Cache of keys and values.
    pub kv_bytes: u64,
    /// Cache of vision features.
    pub features_bytes: u64,
    /// Activations.
    pub workspace_bytes: u64,
    /// This rank's part of the memory shared with the other ranks.
    pub collective_bytes: u64,
    /// Pixels of media that wait to be encoded.
    pub media_bytes: u64,
    /// The process itself: stacks, the runtime, connections, what the allocator keeps.
    pub process_bytes: u64,
}

/// Why there is no plan, or no room for it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// The host has too little memory.
    #[error("a rank needs {needed_bytes} bytes ({plan}), the host has {available_bytes} bytes available per rank")]
    DoesNotFit {
        /// Bytes of the plan.
        needed_bytes: u64,
        /// The plan.
        plan: MemoryPlan,
        /// Bytes of the host that are free or can be, divided by its ranks.
        available_bytes: u64,
    },
    /// The shapes of the model could not be run.
    #[error("cannot plan memory: {0}")]
    Shapes(String),
}

impl MemoryPlan {
    /// All bytes.
    pub fn total_bytes(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Checks that the plan fits the part of `host_available_bytes` that each of `world_size` ranks has.
    ///
    /// # Errors
    /// It does not fit.
    pub fn check_fits(&self, host_available_bytes: u64, world_size: usize) -> Result<(), PlanError> {
        let available_bytes = host_available_bytes / world_size as u64;
        let needed_bytes = self.total_bytes();
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        Err(PlanError::DoesNotFit { needed_bytes, plan: self.clone(), available_bytes })
    }

    fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights_bytes),
            ("keys and values", self.kv_bytes),
            ("features", self.features_bytes),
            ("workspace", self.workspace_bytes),
            ("collective", self.collective_bytes),
            ("media", self.media_bytes),
            ("process", self.process_bytes),
        ]
    }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (name, bytes)) in self.parts().into_iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {bytes}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_does_not_fit_says_what_it_needs() {
        let plan = MemoryPlan { weights_bytes: 70, kv_bytes: 30, ..MemoryPlan::default() };
        plan.check_fits(200, 2).unwrap();
        let error = plan.check_fits(199, 2).unwrap_err().to_string();
        assert!(error.contains("needs 100 bytes (weights 70, keys and values 30,"), "{error}");
        assert!(error.contains("99 bytes available per rank"), "{error}");
    }
}
