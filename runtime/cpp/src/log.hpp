// Where lines for people go: a process has one place for them, because onnxruntime has one. Nowhere, until it is set.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <utility>

namespace autosteer {

using Log = std::function<void(const std::string& line)>;

namespace logging {

inline std::mutex mutex;
inline Log log;

}  // namespace logging

/// Set where lines go; {} for nowhere. It is called by one thread at a time, and must not log or set a log itself.
inline void set_log(Log log) {
  const std::lock_guard lock(logging::mutex);
  logging::log = std::move(log);
}

inline void log_line(const std::string& line) {
  const std::lock_guard lock(logging::mutex);
  if (logging::log) logging::log(line);
}

}  // namespace autosteer
