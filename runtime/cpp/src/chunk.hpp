// What a request is given: an answer, in chunks or as a whole. The C++ side of runtime/chunk.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gate.hpp"
#include "stats.hpp"

namespace autosteer {

/// A piece of an answer. `text` is empty while a character is incomplete.
struct Chunk {
  std::string text;
  std::optional<int64_t> token;  ///< absent for the refusal text
  Verdict verdict;
  /// On the last chunk "stop", "length" or "refused" (by Mode::stop, the monitor, or the gate's verdict on the answer);
  /// else empty
  std::string finish_reason;
  std::optional<Stats> stats;  ///< on the last chunk
};

/// A whole answer, as `generate` returns it.
struct Answer {
  std::string text;
  std::vector<int64_t> token_ids;  ///< with the end-of-turn token if the model wrote one
  Verdict verdict;
  std::string finish_reason;
  Stats stats;

  /// Take in the next chunk.
  void add(const Chunk& chunk) {
    text += chunk.text;
    if (chunk.token) token_ids.push_back(*chunk.token);
    verdict = chunk.verdict;
    finish_reason = chunk.finish_reason;
    if (chunk.stats) stats = *chunk.stats;
  }
};

}  // namespace autosteer
