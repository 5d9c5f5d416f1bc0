//! What a running process takes over of a changed configuration, and what only a restart does.
//!
//! Everything that is read when it is used can change. What was built into something that lives as long as the process, a
//! socket, a pool, a runtime, cannot.

use super::Config;

impl Config {
    /// This configuration as a process that runs with `running` can take it over: fields that need a restart stay as they
    /// are there. Gives the names of those that differ.
    #[must_use]
    pub fn taken_over(mut self, running: &Self) -> (Self, Vec<&'static str>) {
        let mut left = Left(Vec::new());
        left.keep("listen", &mut self.listen, &running.listen);
        left.keep("admin", &mut self.admin, &running.admin);
        // Which files; what they hold is looked at all the time.
        left.keep("tls", &mut self.tls, &running.tls);
        left.keep("upstream", &mut self.upstream, &running.upstream);
        left.keep("cache.max_bytes", &mut self.cache.max_bytes, &running.cache.max_bytes);
        let (cache, running_cache) = (&mut self.cache, &running.cache);
        left.keep("cache.disk", &mut cache.disk, &running_cache.disk);
        left.keep(
            "cache.disk_max_bytes",
            &mut cache.disk_max_bytes,
            &running_cache.disk_max_bytes,
        );
        left.keep(
            "cache.disk_max_age",
            &mut cache.disk_max_age,
            &running_cache.disk_max_age,
        );
        left.keep("shared", &mut self.shared, &running.shared);
        if self.shared.is_some() {
            // What replicas own of an account adds up to its limit only while they all go by the same one.
            left.keep("budget.limit", &mut self.budget.limit, &running.budget.limit);
            left.keep("budget.margin", &mut self.budget.margin, &running.budget.margin);
        }
        let (limits, running_limits) = (&mut self.limits, &running.limits);
        left.keep(
            "limits.upstream_connections",
            &mut limits.upstream_connections,
            &running_limits.upstream_connections,
        );
        left.keep("limits.body_bytes", &mut limits.body_bytes, &running_limits.body_bytes);
        left.keep("worker_threads", &mut self.worker_threads, &running.worker_threads);
        left.keep("log.format", &mut self.log.format, &running.log.format);
        left.keep("otlp", &mut self.otlp, &running.otlp);
        (self, left.0)
    }
}

/// The fields that wait for a restart.
struct Left(Vec<&'static str>);

impl Left {
    fn keep<T: PartialEq + Clone>(&mut self, field: &'static str, new: &mut T, running: &T) {
        if new != running {
            new.clone_from(running);
            self.0.push(field);
        }
    }
}
