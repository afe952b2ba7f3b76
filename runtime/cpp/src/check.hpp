// Replay a package's golden prompts. The C++ side of runtime/check.py, with the same lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace autosteer {

/// One line of the check's table.
struct Check {
  std::string name;
  double value;
  std::optional<double> limit;  ///< absent: reported, not enforced
  bool passed;
};

/// Answer a golden prompt as at the recording: without drafts, in as many tokens, and its turn judged as a whole alone.
inline Answer golden_answer(const Engine& engine, const fs::path& folder, const Golden& golden, Mode mode,
                            double answer_threshold = 1.0) {
  SamplingConfig sampling;
  sampling.max_tokens = static_cast<int64_t>(golden.token_ids.size());
  sampling.speculate = false;
  GatePolicy policy = engine.policy(mode, golden.threshold, {}, false);
  policy.answer_threshold = answer_threshold;
  std::vector<ImageLike> images;
  for (const auto& file : golden.images) images.emplace_back(folder / file);
  std::vector<VideoPart> videos;
  for (const auto& frames : golden.videos) {
    videos.emplace_back();
    for (const auto& file : frames) videos.back().frames.emplace_back(folder / file);
    if (!golden.seconds.empty()) videos.back().seconds = golden.seconds.at(videos.size() - 1);
  }
  const auto encode = [&](Stats& stats) {
    return golden.prompt_ids.empty() ? engine.encode({Message::user(golden.prompt, images, videos)}, stats)
                                     : engine.encoder.prepare_ids(golden.prompt_ids, stats);
  };
  return engine.generate_encoded(encode, sampling, policy);
}

/// How far p_unsafe is from the recorded one: infinitely, if there is none.
inline double golden_drift(const Golden& golden, const Answer& found) {
  if (!golden.p_unsafe) return 0.0;
  const double difference = std::abs(*golden.p_unsafe - found.verdict.p_unsafe.value_or(std::nan("")));
  return std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference;
}

/// What to say if `differ` of the `shown` golden prompts with pictures are answered otherwise here: versions of Pillow
/// resize pictures differently. Pixels here are those of Pillow 13.
inline std::string about_pictures(const Manifest& manifest, int64_t differ, int64_t shown) {
  if (differ == 0) return "";
  const std::string what = " (" + std::to_string(differ) + " of " + std::to_string(shown) +
                           " golden prompts with pictures differ";
  if (manifest.pillow.rfind("13.", 0) == 0) return what + ")";  // it is not to blame
  return what + ": recorded with Pillow " + manifest.pillow + ", answered with pixels of Pillow 13)";
}

/// What came of the golden prompts.
struct Replay {
  std::vector<Check> checks;
  std::string about_pictures;  ///< "" if those with pictures are answered as recorded
};

/// Answer every golden prompt of the package in `folder` again; runtime/check.py says what must be equal. Loading
/// `engine` has already checked hashes, names, shapes and the gate's proof.
inline Replay check_package(const Engine& engine, const fs::path& folder) {
  const Manifest& manifest = engine.manifest;
  const Tolerance& tolerance = manifest.tolerance;
  const auto answer = [&](const Golden& golden, Mode mode, double answer_threshold = 1.0) {
    return golden_answer(engine, folder, golden, mode, answer_threshold);
  };
  const Mode gated = manifest.guarded ? Mode::steer : Mode::off;
  double drift = 0, verdicts = 0, tokens = 0, unsteered = 0, unstopped = 0, fired = 0, unwatched = 0;
  int64_t shown = 0, differ = 0;  // golden prompts with pictures; of these, answered otherwise
  for (const Golden& golden : manifest.golden) {
    const Answer found = answer(golden, gated);
    const double away = golden_drift(golden, found);
    const bool other_verdict = name(found.verdict.action) != golden.action;
    const bool other_tokens = found.token_ids != golden.token_ids;
    drift = std::max(drift, away);
    verdicts += other_verdict;
    tokens += other_tokens;
    if (!golden.images.empty() || !golden.videos.empty()) {
      ++shown;
      differ += away > tolerance.p_unsafe || other_verdict || other_tokens;
    }
    if (manifest.monitor && golden.token_ids.size() > 1) {
      unwatched += answer(golden, gated, -1.0).finish_reason != "refused";
    }
    if (golden.action == "steer") {
      unsteered += found.token_ids == answer(golden, Mode::off).token_ids;
      if (!golden.threshold) {
        ++fired;
        unstopped += answer(golden, Mode::stop).finish_reason != "refused";
      }
    }
  }
  const auto most = static_cast<double>(tolerance.answers);
  std::vector<Check> checks = {
      {"files that match their hash", static_cast<double>(manifest.paths().size()), {}, true},
      {"golden prompts", static_cast<double>(manifest.golden.size()), {}, !manifest.golden.empty()},
      {"of these unsafe at the package's threshold", fired, {}, true},
      {"verdicts that differ", verdicts, 0.0, verdicts == 0},
      {"p_unsafe, largest difference", drift, tolerance.p_unsafe, drift <= tolerance.p_unsafe},
      {"answers that differ", tokens, most, tokens <= most},
      {"steered answers that equal the unsteered", unsteered, 0.0, unsteered == 0},
      {"unsafe prompts that --policy stop answers", unstopped, 0.0, unstopped == 0}};
  if (manifest.monitor) checks.push_back({"answers that the monitor cannot stop", unwatched, 0.0, unwatched == 0});
  return {std::move(checks), about_pictures(manifest, differ, shown)};
}

}  // namespace autosteer
