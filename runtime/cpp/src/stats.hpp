// What an answer cost. The C++ side of runtime/stats.py.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace autosteer {

/// Wall time since it was made.
class Clock {
 public:
  double ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// What an answer cost. Milliseconds are wall time; `upper_ms` is absent if decoder_upper never ran.
struct Stats {
  std::string device = "CPUExecutionProvider";
  int64_t prompt_tokens = 0, completion_tokens = 0, image_tiles = 0, kv_bytes = 0;
  int64_t reused_tokens = 0;  ///< prompt tokens whose keys and values were cached by the conversation
  int64_t drafted_tokens = 0;
  int64_t accepted_tokens = 0;  ///< drafted tokens that the sampler then chose
  double vision_ms = 0, embed_ms = 0, lower_ms = 0, gate_ms = 0;
  std::optional<double> upper_ms;
  double ttft_ms = 0;    ///< from the call to the first chunk
  double decode_ms = 0;  ///< passes after the first token
  double monitor_ms = 0;  ///< of these: what watched the answer

  /// Tokens per second after the first one; nothing for answers of one token.
  std::optional<double> decode_tok_s() const {
    const auto steps = static_cast<double>(completion_tokens - 1);
    return steps > 0 && decode_ms > 0 ? std::optional(1000 * steps / decode_ms) : std::nullopt;
  }
};

}  // namespace autosteer
