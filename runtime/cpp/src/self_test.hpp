// Every load: do prober, monitor and Refusal Head compute here what they did at export? The C++ side of
// runtime/self_test.py. What autosteer-cli --check does, from text to answer, is in check.hpp.
//
// A package has hidden states, and the outputs that prober, monitor, Refusal Head and lm_head gave for them at export
// (GateProof). If their outputs differ here, the package does not load.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <ios>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "generation.hpp"
#include "manifest.hpp"
#include "packed.hpp"
#include "subgraph.hpp"

namespace autosteer {

constexpr double kProberLimit = 1e-3;  // difference of p_unsafe: the prober is float32 in every package
constexpr double kSteerLimit = 1e-3;   // error of what the Refusal Head adds, relative to it
constexpr double kExactShiftLimit = 0.01, kShiftLimit = 0.25;  // error of the logits' shift, relative to it
constexpr int64_t kBeginning = 8, kTexts = 3, kWords = 16;  // texts of so many tokens, and what they begin with
constexpr double kHiddenLimit = 0.05;  // what hidden texts change, relative to what they change if they are seen
constexpr float kPossible = 1e30F;  // larger logits mask tokens that the model never generates

namespace self_test {

/// The proof's hidden states, one vector after the other.
inline std::vector<float> states(const fs::path& folder, const Manifest& manifest) {
  const GateProof& proof = manifest.proof.value();
  const auto count =
      static_cast<size_t>(manifest.dims.hidden_size) * (proof.p_unsafe.size() + 2 * proof.steered.size());
  std::vector<float> all(count);
  std::ifstream file(folder / proof.file, std::ios::binary);
  file.read(reinterpret_cast<char*>(all.data()), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file) throw PackageError((folder / proof.file).string() + ": not readable; copy the package again");
  return all;
}

/// |a - b| / |c - d| of arrays of `width` numbers.
inline double relative(const float* a, const float* b, const float* c, const float* d, int64_t width) {
  double off = 0, all = 0;
  for (int64_t i = 0; i < width; ++i) {
    off += std::pow(static_cast<double>(a[i]) - b[i], 2);
    all += std::pow(static_cast<double>(c[i]) - d[i], 2);
  }
  return std::sqrt(off / all);
}

/// Root mean square of what steering adds to logits (V,); NaN if either is not finite.
inline double logits_shift(const std::vector<float>& plain, const float* steered) {
  double sum = 0, count = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    if (std::abs(plain[i]) > kPossible) continue;
    sum += std::pow(static_cast<double>(steered[i]) - plain[i], 2);
    ++count;
  }
  return std::sqrt(sum / count);
}

inline std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

}  // namespace self_test

/// Throws PackageError if a text sees others that share its pass (packed.hpp), or not what all begin with: other words
/// would hide its own from the prober. Three texts behind one beginning; the last is compared with itself alone.
inline void check_packs(const Manifest& manifest, const Graphs& graphs) {
  if (!manifest.reads_in_packs()) return;
  constexpr int64_t all = kBeginning + kTexts * kWords;
  const int64_t width = manifest.dims.hidden_size, vocabulary = manifest.dims.vocab_size;
  std::vector<int64_t> ids;
  for (int64_t i = 1; i <= all; ++i) ids.push_back(i * std::max<int64_t>(1, vocabulary / (all + 1)) % vocabulary);
  const Subgraph& embed = graphs.at("embed_tokens");
  const auto outputs = embed.run(Tensor<int64_t>::view(ids.data(), {1, all}));
  const float* rows = floats(outputs.at("inputs_embeds"), all * width, embed);
  std::vector<EncodedPrompt> texts(static_cast<size_t>(kTexts));
  for (int64_t text = 0; text < kTexts; ++text) {
    EncodedPrompt& prompt = texts[static_cast<size_t>(text)];
    prompt.inputs_embeds.width = width;
    prompt.inputs_embeds.append(rows, kBeginning);
    prompt.inputs_embeds.append(rows + (kBeginning + text * kWords) * width, kWords);
    prompt.keys.resize(static_cast<size_t>(kBeginning + kWords));
    for (int64_t at = 0; at < kBeginning + kWords; ++at) prompt.positions.push_back({at, at, at});
  }
  KVCache cache(manifest.graphs.at("decoder_lower"), manifest, all);
  const auto last_row = [&](const std::vector<const EncodedPrompt*>& prompts, int64_t shared, bool hide) {
    const Tensor<float> states = run_pack(manifest, graphs, cache, prompts, shared, hide);
    const float* end = states.data() + states.size();
    return std::vector<float>(end - width, end);
  };
  const std::vector<float> alone = last_row({&texts.back()}, 0, true);  // leaves the beginning in the cache
  const auto off = [&](bool hide) {
    std::vector<const EncodedPrompt*> together;
    for (const EncodedPrompt& text : texts) together.push_back(&text);
    const std::vector<float> found = last_row(together, kBeginning, hide);
    double sum = 0;
    for (size_t i = 0; i < found.size(); ++i) sum += std::pow(static_cast<double>(found[i]) - alone[i], 2);
    return std::sqrt(sum);
  };
  const double hidden = off(true), seen = off(false);
  if (!(hidden < kHiddenLimit * seen)) {
    throw PackageError("decoder_lower: a text that shares a pass with others is read otherwise (its state is off by " +
                       self_test::number(hidden) + ", by " + self_test::number(seen) +
                       " if it sees them): the graph is not the package's, or this onnxruntime computes it wrong");
  }
}

/// Throws PackageError if outputs of prober, monitor, Refusal Head or lm_head differ from the package's proof. Steering
/// is tested through the bindings of a decode step.
inline void check_gate(const fs::path& folder, const Manifest& manifest, const Graphs& graphs) {
  if (!manifest.proof || !manifest.refusal) return;
  const int64_t width = manifest.dims.hidden_size, vocabulary = manifest.dims.vocab_size;
  const GateProof& proof = *manifest.proof;
  const std::vector<float> states = self_test::states(folder, manifest);
  const float* state = states.data();
  for (const auto& [name, scores] : {std::pair{"prober", &proof.p_unsafe}, {"monitor", &proof.monitor}}) {
    const float* known = state;
    for (const double p_unsafe : *scores) {
      const double found = probe(graphs.at(name), Log(), {known, known + width});
      if (!(std::abs(found - p_unsafe) <= kProberLimit)) {
        throw PackageError(std::string(name) + ": a known state has p_unsafe " + self_test::number(found) +
                           " here, and had " + self_test::number(p_unsafe) + " at export");
      }
      known += width;
    }
  }
  state += width * static_cast<int64_t>(proof.p_unsafe.size());
  const float* expected = state + width * static_cast<int64_t>(proof.steered.size());
  Tensor<float> last({1, 1, width}), steered({1, 1, width}), logits({1, 1, vocabulary});
  Tensor<float> none({1}, {0.0F}), strength({1}, {static_cast<float>(manifest.refusal->strength)});
  std::vector<Call> plain = steered_head(graphs, last.value(), none.value(), steered.value(), logits.value());
  std::vector<Call> steer = steered_head(graphs, last.value(), strength.value(), steered.value(), logits.value());
  for (const SteeredState& known : proof.steered) {
    std::copy(state, state + width, last.data());
    for (Call& call : plain) call();
    const std::vector<float> as_it_is(logits.data(), logits.data() + vocabulary);
    for (Call& call : steer) call();
    const double off = self_test::relative(steered.data(), expected, expected, state, width);
    if (!(off <= kSteerLimit)) {
      throw PackageError("refusal_head: it steers otherwise than at export (by " + self_test::number(off) +
                         " of what it adds): its steer matrix is not the package's, or this onnxruntime computes it "
                         "wrong");
    }
    const double shift = self_test::logits_shift(as_it_is, logits.data());
    const auto token = std::max_element(as_it_is.begin(), as_it_is.end()) - as_it_is.begin();
    const auto steered_token = std::max_element(logits.data(), logits.data() + vocabulary) - logits.data();
    const double limit = manifest.exact() ? kExactShiftLimit : kShiftLimit;
    const bool near = std::abs(shift - known.shift) <= limit * known.shift;
    if (!near || token != known.token || steered_token != known.steered_token) {
      throw PackageError("lm_head: steering a known state moves its logits by " + self_test::number(shift) +
                         " and its token from " + std::to_string(token) + " to " + std::to_string(steered_token) +
                         "; at export by " + self_test::number(known.shift) + ", from " + std::to_string(known.token) +
                         " to " + std::to_string(known.steered_token));
    }
    state += width;
    expected += width;
  }
}

}  // namespace autosteer
