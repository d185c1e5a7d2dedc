//! Single flight: many ask for the same thing, one makes it, the others wait and then find it made.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, Weak},
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// One lock per key, gone when nobody holds or waits for it.
pub struct Flights<K> {
    locks: Mutex<HashMap<K, Weak<AsyncMutex<()>>>>,
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Flights { locks: Mutex::new(HashMap::new()) }
    }
}

impl<K: Eq + Hash + Clone> Flights<K> {
    /// Waits until nobody else works on `key`. The holder must look again whether the thing is there before making it.
    pub async fn enter(&self, key: &K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().expect("no panic while holding the table of flights");
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(AsyncMutex::new(()));
                    locks.insert(key.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }

    /// The same without waiting: none when somebody works on `key` or waits to.
    pub fn try_enter(&self, key: &K) -> Option<OwnedMutexGuard<()>> {
        let mut locks = self.locks.lock().expect("no panic while holding the table of flights");
        locks.retain(|_, lock| lock.strong_count() > 0);
        if locks.contains_key(key) {
            return None;
        }
        let lock = Arc::new(AsyncMutex::new(()));
        let entered = Arc::clone(&lock).try_lock_owned().ok()?;
        locks.insert(key.clone(), Arc::downgrade(&lock));
        Some(entered)
    }

    /// Whether somebody works on `key` now.
    pub fn is_busy(&self, key: &K) -> bool {
        let locks = self.locks.lock().expect("no panic while holding the table of flights");
        locks.get(key).is_some_and(|lock| lock.strong_count() > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_makes_it_and_the_others_wait() {
        let flights = Arc::new(Flights::<u32>::default());
        let (made, inside) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let (flights, made, inside) = (flights.clone(), made.clone(), inside.clone());
                tokio::spawn(async move {
                    let _flight = flights.enter(&7).await;
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                    if made.load(Ordering::SeqCst) == 0 {
                        tokio::task::yield_now().await;
                        made.fetch_add(1, Ordering::SeqCst);
                    }
                    inside.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("no panic");
        }
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert!(!flights.is_busy(&7));
    }
}
