// The answer, watched: the C++ side of runtime/monitor.py, which says what is read, held back and stopped.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "manifest.hpp"
#include "stats.hpp"
#include "subgraph.hpp"

namespace autosteer {

/// What the monitor made of one answer so far. What it is given must outlive it.
class Monitor {
 public:
  const size_t window;  ///< tokens
  const bool stops;     ///< false: it only reports

  /// `manifest` has a monitor. `policy`.answer_threshold, if there is one, stands in for its threshold.
  Monitor(const Manifest& manifest, const Graphs& graphs, const Log& log, const GatePolicy& policy, Stats& stats)
      : window(static_cast<size_t>(manifest.monitor.value().window)),
        stops(policy.mode != Mode::report),
        graph_(graphs.at("monitor")),
        log_(log),
        threshold_(policy.answer_threshold.value_or(manifest.monitor->threshold)),
        stats_(stats),
        width_(static_cast<size_t>(manifest.dims.hidden_size)),
        states_(window * width_) {}

  /// Read the next token's hidden state (D,).
  void read(const float* state) {
    const Clock clock;
    std::copy(state, state + width_, states_.data() + read_ % window * width_);
    ++read_;
    if (read_ >= window) score();
    stats_.monitor_ms += clock.ms();
  }

  /// The answer has ended: score one that is shorter than a window.
  void end() {
    if (0 < read_ && read_ < window) score();
  }

  /// On the answer so far; nothing if no window has been read.
  std::optional<AnswerVerdict> verdict() const {
    if (!worst_) return std::nullopt;
    return AnswerVerdict{*worst_, !is_safe(*worst_, threshold_), threshold_};
  }

 private:
  void score() {
    std::vector<const float*> rows;
    for (size_t row = 0; row < std::min(read_, window); ++row) rows.push_back(states_.data() + row * width_);
    const std::vector<float> mean = mean_of_rows(rows, static_cast<int64_t>(width_));
    const double p_unsafe = probe(graph_, log_, mean, "the monitor failed; the answer counts as unsafe");
    worst_ = worst_ ? worse(*worst_, p_unsafe) : p_unsafe;
  }

  const Subgraph& graph_;
  const Log& log_;
  const double threshold_;
  Stats& stats_;
  const size_t width_;
  std::vector<float> states_;  // (window, D), the oldest overwritten
  size_t read_ = 0;            // tokens
  std::optional<double> worst_;
};

}  // namespace autosteer
