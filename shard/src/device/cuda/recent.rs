//! A map of a bounded number of entries, which gives up the one that was not used for longest.

use std::{collections::HashMap, hash::Hash};

/// The map.
pub struct Recent<K, V> {
    /// Each with the number of its last use.
    entries: HashMap<K, (V, u64)>,
    num_uses: u64,
    capacity: usize,
}

impl<K: Clone + Eq + Hash, V> Recent<K, V> {
    /// An empty one, for so many entries.
    pub fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), num_uses: 0, capacity }
    }

    /// What a key has, which is a use of it.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        self.num_uses += 1;
        let (value, last_use) = self.entries.get_mut(key)?;
        *last_use = self.num_uses;
        Some(value)
    }

    /// Gives a key a value, which is a use of it. Where all places are taken, another key loses its own.
    pub fn insert(&mut self, key: K, value: V) {
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&key) {
            let oldest = self.entries.iter().min_by_key(|(_, (_, last_use))| *last_use);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.entries.remove(&oldest);
            }
        }
        self.num_uses += 1;
        self.entries.insert(key, (value, self.num_uses));
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_that_was_not_used_for_longest_goes_first() {
        let mut recent = Recent::new(2);
        recent.insert("a", 1);
        recent.insert("b", 2);
        assert_eq!(recent.get(&"a"), Some(&1));
        recent.insert("c", 3);
        assert_eq!(recent.get(&"b"), None);
        assert_eq!(recent.get(&"a"), Some(&1));
        // A key that has a value takes no other place.
        recent.insert("a", 4);
        assert_eq!(recent.get(&"c"), Some(&3));
        assert_eq!(recent.get(&"a"), Some(&4));
    }
}
