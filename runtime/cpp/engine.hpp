// Load a package and answer prompts: THE loop, with the gate inside it. The C++ side of runtime/engine.py, name by
// name.
//
//     images -> vision_encoder -> rows ---+     or, where images are tokens: image_tokenizer -> ids -> embed_tokens
//     text   -> token ids -> embed_tokens +-> decoder_lower -> prober -> decide
//                                                                  STOP:  the refusal text, and nothing more runs
//                                                                  STEER: strength > 0     PASS: strength = 0
//            -> decoder_upper -> (refusal_head) -> lm_head -> sample -> text
//                  ^                                             |
//                  +---- decoder_lower <- embed_tokens <---------+
//
// Prefill is layer-major: decoder_lower sees the whole prompt, the prober reads one row of what comes out, and only
// then does decoder_upper run. The gate changes the head and never the caches, so this is the same computation as layer
// by layer; and a stopped prompt costs k/N of prefill and no decoding.
//
// All state belongs to a request. One Engine may serve several threads; a Stream belongs to one.
#pragma once

#include <sched.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "gate.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "sampling.hpp"
#include "subgraph.hpp"
#include "text.hpp"
#include "tokenizer.hpp"
#include "video.hpp"

namespace autosteer {

constexpr int64_t kPrefillChunk = 128;  // tokens: bounds activations; results do not depend on it
constexpr int64_t kTilesPerRun = 4;     // bounds the vision encoder's activations

/// Wall time since it was made.
class Clock {
 public:
  double ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// What an answer cost. Milliseconds are wall time; `upper_ms` is absent where decoder_upper never ran.
struct Stats {
  std::string device = "CPUExecutionProvider";
  int64_t prompt_tokens = 0, completion_tokens = 0, image_tiles = 0, kv_bytes = 0;
  int64_t reused_tokens = 0, drafted_tokens = 0, accepted_tokens = 0;  ///< 0: only the Python loop reuses and drafts
  double vision_ms = 0, embed_ms = 0, lower_ms = 0, gate_ms = 0;
  std::optional<double> upper_ms;
  double ttft_ms = 0;    ///< from the call to the first chunk
  double decode_ms = 0;  ///< steps after the first token

  /// Tokens per second after the first one; nothing for answers of one token.
  std::optional<double> decode_tok_s() const {
    const auto steps = static_cast<double>(completion_tokens - 1);
    return steps > 0 && decode_ms > 0 ? std::optional(1000 * steps / decode_ms) : std::nullopt;
  }
};

/// A piece of an answer. `text` may be empty while a character is incomplete.
struct Chunk {
  std::string text;
  std::optional<int64_t> token;  ///< absent for the refusal text of Mode::stop, which no model wrote
  Verdict verdict;
  std::string finish_reason;   ///< stop, length or refused on the last chunk; empty before
  std::optional<Stats> stats;  ///< on the last chunk
};

/// A whole answer, as `generate` returns it.
struct Answer {
  std::string text;
  std::vector<int64_t> token_ids;  ///< the end-of-turn token included where the model wrote one
  Verdict verdict;
  std::string finish_reason;
  Stats stats;
};

/// How to load a package.
struct EngineOptions {
  std::string device = "auto";                            ///< auto or cpu
  int threads = 0;                                        ///< 0: every CPU this process may use
  std::function<void(const std::string& line)> log = {};  ///< told why a prober failed; never prompts
};

/// A dialogue ready for the decoder.
struct Prompt {
  Rows inputs_embeds;              // (S, D)
  std::vector<int64_t> token_ids;  // text tokens only: what the repetition penalty looks at
  std::vector<int64_t> probed;     // rows whose mean the prober reads; none where the prompt is too short
};

class Stream;

/// A loaded package.
class Engine {
 public:
  /// Check every file of `folder` against the manifest's hashes and load it.
  /// Throws PackageError (damaged, incomplete, other version) or ProviderError (device not available).
  explicit Engine(const fs::path& folder, const EngineOptions& options = {})
      : manifest(Manifest::load(folder)), log(options.log), tokenizer(checked(folder)) {
    if (options.device != "auto" && options.device != "cpu") {
      throw ProviderError("--device " + options.device + ": the C++ runtime binds CPU buffers only; use --device cpu");
    }
    environment_ = make_environment(options.threads > 0 ? options.threads : usable_cpus());
    const auto load = [&](const std::string& name, const GraphSpec& spec) {
      graphs_.try_emplace(name, environment_, folder / spec.file, spec);
    };
    // The image graph first: loading it takes the most memory for a moment, best while nothing else is there.
    for (const char* name : {"vision_encoder", "image_tokenizer"}) {
      if (const auto found = manifest.graphs.find(name); found != manifest.graphs.end()) load(name, found->second);
    }
    for (const auto& [name, spec] : manifest.graphs) load(name, spec);
  }

  /// The package's own policy, with what you override. Throws PackageError where it has no gate and `mode` needs one.
  /// Throws InputError for numbers that would not guard.
  GatePolicy policy(Mode mode = Mode::steer, std::optional<double> threshold = {},
                    std::optional<double> strength = {}) const {
    if (!manifest.prober || !manifest.refusal) {
      if (mode != Mode::off) {
        throw PackageError(
            "this package was exported with --unguarded: it has no prober and no refusal head; "
            "run it with --policy off, or export it again with --safety");
      }
      return {mode, 0.0, 0.0, ""};
    }
    const GatePolicy policy{mode, threshold.value_or(manifest.prober->threshold),
                            strength.value_or(manifest.refusal->strength), manifest.refusal->text};
    policy.check();
    return policy;
  }

  /// Answer a dialogue piece by piece; every piece carries the verdict. Nothing runs before the first `next()`.
  /// The engine must outlive the stream.
  Stream stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy) const;

  /// The whole answer at once; `on_chunk`, if given, sees every piece as it comes.
  Answer generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                  const std::function<void(const Chunk&)>& on_chunk = {}) const;

  /// Render a dialogue, encode its images and videos, and lay all out as the decoder's input rows.
  Prompt prepare(const std::vector<Message>& messages, Stats& stats) const {
    std::vector<Image> pictures;
    std::vector<const VideoPart*> videos;
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        if (const auto* image = std::get_if<ImageLike>(&part)) pictures.push_back(open_image(*image));
        if (const auto* video = std::get_if<VideoPart>(&part)) videos.push_back(video);
      }
    }
    if (!pictures.empty() && !manifest.image) throw InputError("this model takes no images");
    check_videos(videos);
    int64_t opening_tokens = 0;
    const std::vector<Run> runs = render(messages, manifest.prompt, tokenizer, &opening_tokens);
    std::vector<std::vector<Laid>> encoded;
    for (const Image& picture : pictures) encoded.push_back(encode_image(picture, pictures.size() == 1, stats));
    std::vector<Laid> filmed;
    for (const VideoPart* video : videos) filmed.push_back({{}, encode_video(*video, stats)});
    const Clock clock;
    Prompt prompt{{manifest.dims.hidden_size, {}}, {}, {}};
    std::vector<int64_t> text_rows;
    size_t image = 0, video = 0, earlier = 0;  // images, videos; images of earlier turns
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        earlier += &message != &messages.back() && std::holds_alternative<ImageLike>(part) ? 1 : 0;
      }
    }
    const auto add = [&](const std::vector<int64_t>& ids, const Rows& rows) {
      for (size_t i = 0; i < ids.size(); ++i) {
        text_rows.push_back(prompt.inputs_embeds.count() + static_cast<int64_t>(i));
      }
      prompt.inputs_embeds.append(rows.row(0), rows.count());
      prompt.token_ids.insert(prompt.token_ids.end(), ids.begin(), ids.end());
    };
    for (const Run& run : runs) {
      if ((run.slot == "image" && image == encoded.size()) || (run.slot == "video" && video == filmed.size())) {
        throw PackageError("the prompt template asks for an " + run.slot + " too many");
      }
      if (run.slot != "image") {
        add(run.ids, run.slot.empty() ? embed(run.ids) : filmed[video++].rows);
        continue;
      }
      for (const Laid& part : encoded[image]) {
        if (image < earlier) opening_tokens += static_cast<int64_t>(part.ids.size());
        add(part.ids, part.ids.empty() ? part.rows : embed(part.ids));
      }
      ++image;
    }
    if (manifest.prober) {
      const int64_t last = prompt.inputs_embeds.count() + manifest.prober->token_offset;
      if (manifest.prober->pooling == "last") {
        if (last >= 0) prompt.probed = {last};
      } else {  // pictures' rows would drown the text, whose rows have seen them
        for (auto row = text_rows.begin() + opening_tokens; row != text_rows.end() && *row <= last; ++row) {
          prompt.probed.push_back(*row);
        }
      }
    }
    stats.embed_ms = clock.ms();
    stats.prompt_tokens = prompt.inputs_embeds.count();
    return prompt;
  }

  /// One image -> what stands for it in the prompt: its rows, and token ids between.
  std::vector<Laid> encode_image(const Image& picture, bool alone, Stats& stats) const {
    const Clock clock;
    const ImageSpec& spec = manifest.image.value();
    const Tiles tiles = cut(picture, spec, alone);
    const Rows pixel_values = normalise(tiles.images, spec);
    std::vector<Rows> rows;
    if (graphs_.count("image_tokenizer")) {
      rows.push_back(embed(tokenize_image(pixel_values)));
    } else {
      rows = encode_tiles(pixel_values, picture.height, picture.width);
    }
    stats.image_tiles += pixel_values.count();
    stats.vision_ms += clock.ms();
    return lay_out(std::move(rows), tiles.grid, spec);
  }

  /// Throws InputError for videos that this model cannot take, before anything is computed of them.
  void check_videos(const std::vector<const VideoPart*>& videos) const {
    if (videos.empty()) return;
    if (!manifest.video) throw InputError("this model takes no videos");
    int64_t frames = 0, rows = 0;
    for (const VideoPart* video : videos) {
      const auto count = static_cast<int64_t>(video->frames.size());
      if (!count) throw InputError("a video has no frames");
      frames += count;
      rows += count * manifest.video->pooled_side * manifest.video->pooled_side + 1;
    }
    if (rows >= manifest.dims.context_length) {
      throw InputError("the video takes " + std::to_string(rows) + " tokens (" + std::to_string(frames) +
                       " frames); the model's context holds " + std::to_string(manifest.dims.context_length) +
                       "; take fewer frames");
    }
  }

  /// A video -> its rows: of each frame a few, and one newline row at the very end. Frames are opened a few at a time.
  Rows encode_video(const VideoPart& video, Stats& stats) const {
    const Clock clock;
    const int64_t depth = manifest.dims.hidden_size, side = manifest.image.value().anyres.value().tokens_per_side;
    Rows rows{depth, {}}, newline{depth, {}};
    for (size_t first = 0; first < video.frames.size(); first += kTilesPerRun) {
      std::vector<Image> tiles;
      for (size_t i = first; i < std::min<size_t>(first + kTilesPerRun, video.frames.size()); ++i) {
        tiles.push_back(squeeze(open_image(video.frames[i]), manifest.image->tile_size));
      }
      const Rows pixel_values = normalise(tiles, manifest.video.value());
      run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t count, const auto& outputs) {
        const int64_t all = count * side * side;
        Rows features{depth, {}};
        features.append(floats(outputs.at(0), all * depth, graph), all);
        const Rows pooled = pool(features, side, manifest.video->pooled_side);
        rows.append(pooled.row(0), pooled.count());
        newline.data.clear();
        newline.append(floats(outputs.at(1), depth, graph), 1);
      });
    }
    rows.append(newline.row(0), 1);
    stats.image_tiles += static_cast<int64_t>(video.frames.size());
    stats.vision_ms += clock.ms();
    return rows;
  }

  /// pixel_values (tiles, 3 * size * size) of one image -> its token ids, in order.
  std::vector<int64_t> tokenize_image(const Rows& pixel_values) const {
    std::vector<int64_t> ids;
    run_tiles("image_tokenizer", pixel_values, [&](const Subgraph& graph, int64_t, const auto& outputs) {
      const auto [found, count] = values<int64_t>(outputs.at(0), graph);
      ids.insert(ids.end(), found, found + count);
    });
    return ids;
  }

  /// pixel_values (tiles, 3 * size * size) of one image (height, width) -> its runs of rows (n, D): one for each tile, or
  /// one in all where `anyres` puts tiles together.
  std::vector<Rows> encode_tiles(const Rows& pixel_values, int64_t height, int64_t width) const {
    const ImageSpec& spec = manifest.image.value();
    const int64_t depth = manifest.dims.hidden_size;
    std::vector<Rows> runs;
    Rows newline{depth, {}};
    run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t tiles, const auto& outputs) {
      const auto [features, count] = values<float>(outputs.at(0), graph);
      const int64_t each = spec.anyres ? spec.anyres->tokens_per_side * spec.anyres->tokens_per_side
                                       : count / (tiles * depth);
      floats(outputs.at(0), tiles * each * depth, graph);  // or it throws
      for (int64_t tile = 0; tile < tiles; ++tile) {
        runs.push_back({depth, {features + tile * each * depth, features + (tile + 1) * each * depth}});
      }
      if (spec.anyres && newline.data.empty()) newline.append(floats(outputs.at(1), depth, graph), 1);
    });
    if (!spec.anyres) return runs;
    Rows together{depth, {}};
    for (const Rows& run : runs) together.append(run.row(0), run.count());
    return {pack(together, newline, height, width, spec)};
  }

  /// Run an image graph, a few tiles at a time.
  template <class Use>
  void run_tiles(const char* name, const Rows& pixel_values, const Use& use) const {
    const int64_t size = manifest.image.value().tile_size;
    for (int64_t first = 0; first < pixel_values.count(); first += kTilesPerRun) {
      const int64_t tiles = std::min(kTilesPerRun, pixel_values.count() - first);
      use(graph(name), tiles, graph(name).run(Tensor<float>::view(pixel_values.row(first), {tiles, 3, size, size})));
    }
  }

  /// Token ids (n,) -> their rows (n, D).
  Rows embed(const std::vector<int64_t>& token_ids) const {
    const auto n = static_cast<int64_t>(token_ids.size());
    if (n == 0) return {manifest.dims.hidden_size, {}};
    const Subgraph& table = graph("embed_tokens");
    const auto outputs = table.run(Tensor<int64_t>::view(token_ids.data(), {1, n}));
    Rows rows{manifest.dims.hidden_size, {}};
    rows.append(floats(outputs.at(0), n * rows.width, table), n);
    return rows;
  }

  const Subgraph& graph(const std::string& name) const { return graphs_.at(name); }

  const Manifest manifest;
  const std::function<void(const std::string&)> log;
  const Tokenizer tokenizer;

 private:
  /// The tokenizer's path, once every file of the package has been checked.
  fs::path checked(const fs::path& folder) const {
    manifest.verify(folder);
    return folder / manifest.prompt.tokenizer;
  }

  static int usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
    return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
  }

  Ort::Env environment_{nullptr};
  std::map<std::string, Subgraph> graphs_;
};

/// One answer in the making: `judge` runs the lower half and the gate, `begin` the upper half, `step` one token.
class Request {
 public:
  const int64_t max_tokens;

  Request(const Engine& engine, Prompt prompt, int64_t max_tokens, Stats& stats)
      : max_tokens(max_tokens),
        engine_(engine),
        stats_(stats),
        embeds_(std::move(prompt.inputs_embeds)),
        probed_(std::move(prompt.probed)),
        length_(embeds_.count()),
        lower_(half("decoder_lower"), engine.manifest.dims, length_ + max_tokens),
        upper_(half("decoder_upper"), engine.manifest.dims, length_ + max_tokens),
        last_({1, 1, width()}),
        logits_({1, 1, engine.manifest.dims.vocab_size}) {
    stats.kv_bytes = lower_.bytes + upper_.bytes;
  }

  /// Run decoder_lower over the prompt and decide. A prober that fails is an unsafe verdict, not an exception.
  Verdict judge(const GatePolicy& policy) {
    const Clock lower_clock;
    for (int64_t first = 0; first < length_; first += kPrefillChunk) {
      const int64_t rows = std::min(kPrefillChunk, length_ - first);
      const Ort::Value embeds = Tensor<float>::view(embeds_.row(first), {1, rows, width()});
      hidden_.emplace_back(std::vector<int64_t>{1, rows, width()});
      set_length(first + rows);
      lower({"inputs_embeds", &embeds}, {"hidden_states", &hidden_.back().value()})();
    }
    embeds_ = {};
    stats_.lower_ms = lower_clock.ms();
    const Clock gate_clock;
    std::optional<double> p_unsafe;
    if (policy.mode != Mode::off) p_unsafe = probe();
    const Verdict verdict = decide(p_unsafe, policy, engine_.manifest.split_layer);
    stats_.gate_ms = gate_clock.ms();
    return verdict;
  }

  /// Run decoder_upper over the prompt; logits (V,) of the first answer token, steered by `strength`.
  std::vector<float> begin(double strength) {
    const Clock clock;
    int64_t done = 0;
    for (const auto& hidden : hidden_) {
      done += hidden.shape()[1];
      set_length(done);
      upper({"hidden_states", &hidden.value()}, {"last_hidden_state", &last_.value()})();
    }
    hidden_.clear();
    stats_.upper_ms = clock.ms();
    bind_step(strength);
    head();
    return read_logits();
  }

  /// Feed one token; logits (V,) of the next.
  std::vector<float> step(int64_t token) {
    set_length(++length_);
    *token_.data() = token;
    for (size_t i = 0; i < first_of_head_; ++i) calls_[i]();
    head();
    return read_logits();
  }

 private:
  using Binding = std::pair<std::string, const Ort::Value*>;

  /// What the prober says, and NaN where it says nothing: whatever went wrong, the prompt was not shown to be safe.
  double probe() const {
    std::string reason = "unknown";
    try {
      const Subgraph& prober = engine_.graph("prober");
      const std::vector<float> row = probed_row();
      const auto outputs = prober.run(Tensor<float>::view(row.data(), {1, width()}));
      return static_cast<double>(*floats(outputs.at(0), 1, prober));
    } catch (const std::exception& err) {
      reason = err.what();
    } catch (...) {
    }
    if (engine_.log) engine_.log("the prober failed; the prompt counts as unsafe (" + reason + ")");
    return std::nan("");
  }

  /// What the prober reads, (D,): HF's hidden_states[split_layer], the mean over the prompt's `probed` rows.
  std::vector<float> probed_row() const {
    if (probed_.empty()) throw PackageError("the prompt has no row for the prober");
    std::vector<double> sum(static_cast<size_t>(width()), 0.0);
    for (const int64_t at : probed_) {
      const float* row = hidden_[static_cast<size_t>(at / kPrefillChunk)].data() + (at % kPrefillChunk) * width();
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += row[i];
    }
    std::vector<float> mean;
    for (const double value : sum) mean.push_back(static_cast<float>(value / static_cast<double>(probed_.size())));
    return mean;
  }

  /// One decode step with every buffer bound once: embed, lower, upper, then the head.
  void bind_step(double strength) {
    calls_.clear();
    calls_.push_back(call("embed_tokens", {{"input_ids", &token_.value()}}, {{"inputs_embeds", &row_.value()}}));
    calls_.push_back(lower({"inputs_embeds", &row_.value()}, {"hidden_states", &state_.value()}));
    calls_.push_back(upper({"hidden_states", &state_.value()}, {"last_hidden_state", &last_.value()}));
    first_of_head_ = calls_.size();
    const Ort::Value* projected = &last_.value();
    if (strength != 0.0) {  // at strength 0 the Refusal Head changes nothing and is left out
      *strength_.data() = static_cast<float>(strength);
      projected = &steered_.value();
      calls_.push_back(call("refusal_head", {{"last_hidden_state", &last_.value()}, {"strength", &strength_.value()}},
                            {{"steered_hidden_state", projected}}));
    }
    calls_.push_back(call("lm_head", {{"last_hidden_state", projected}}, {{"logits", &logits_.value()}}));
  }

  void head() {
    for (size_t i = first_of_head_; i < calls_.size(); ++i) calls_[i]();
  }

  Call call(const char* graph, const Call::Bound& inputs, const Call::Bound& outputs) const {
    return {engine_.graph(graph), inputs, outputs};
  }

  Call lower(Binding in, Binding out) const {
    return half_call("decoder_lower", lower_, std::move(in), std::move(out));
  }
  Call upper(Binding in, Binding out) const {
    return half_call("decoder_upper", upper_, std::move(in), std::move(out), {{"num_logits", &num_logits_.value()}});
  }

  Call half_call(const char* graph, const KVCache& cache, Binding in, Binding out, const Call::Bound& more = {}) const {
    Call::Bound inputs = cache.past, outputs = cache.present;
    inputs.insert(inputs.end(),
                  {std::move(in), {"seqlens_k", &seqlens_k_.value()}, {"total_sequence_length", &total_.value()}});
    inputs.insert(inputs.end(), more.begin(), more.end());
    outputs.push_back(std::move(out));
    return call(graph, inputs, outputs);
  }

  void set_length(int64_t total) {
    *seqlens_k_.data() = static_cast<int32_t>(total - 1);
    *total_.data() = static_cast<int32_t>(total);
  }

  std::vector<float> read_logits() const { return {logits_.data(), logits_.data() + logits_.size()}; }
  const GraphSpec& half(const char* name) const { return engine_.manifest.graphs.at(name); }
  int64_t width() const { return engine_.manifest.dims.hidden_size; }

  const Engine& engine_;
  Stats& stats_;
  Rows embeds_;
  std::vector<int64_t> probed_;
  int64_t length_;
  KVCache lower_, upper_;
  Tensor<int32_t> seqlens_k_{{1}}, total_{{}};
  Tensor<int64_t> num_logits_{{1}, {1}};
  std::vector<Tensor<float>> hidden_;  // decoder_lower's output, chunk by chunk
  Tensor<float> last_, logits_;
  Tensor<int64_t> token_{{1, 1}};
  Tensor<float> row_{{1, 1, width()}}, state_{{1, 1, width()}}, steered_{{1, 1, width()}}, strength_{{1}};
  std::vector<Call> calls_;
  size_t first_of_head_ = 0;
};

/// An answer as it comes: `next` until it returns nothing.
class Stream {
 public:
  Stream(const Engine& engine, std::vector<Message> messages, const SamplingConfig& sampling, GatePolicy policy)
      : engine_(engine),
        messages_(std::move(messages)),
        policy_(std::move(policy)),
        sampling_(sampling),
        sample_(sampling),
        detokeniser_(engine.tokenizer, sampling.stop) {
    sampling.check();
    policy_.check();
    for (const std::string& stop : sampling.stop) {
      if (!unicode::is_valid(stop)) throw InputError("a stop string is not valid Unicode text");
    }
  }

  Stream(const Stream&) = delete;  // the request points into it
  Stream& operator=(const Stream&) = delete;

  /// The next piece. Throws InputError where the prompt or an image is unusable or does not fit the context.
  /// After an exception the stream has ended.
  std::optional<Chunk> next() {
    if (ended_) return std::nullopt;
    ended_ = true;  // unless this piece is made and is not the last
    Chunk chunk = request_ ? continue_answer() : begin_answer();
    ended_ = !chunk.finish_reason.empty();
    if (ended_) {
      chunk.stats = stats_;
      request_.reset();
    }
    return chunk;
  }

 private:
  Chunk begin_answer() {
    const Clock clock;
    Prompt prompt = engine_.prepare(messages_, stats_);
    const int64_t length = prompt.inputs_embeds.count(), context = engine_.manifest.dims.context_length;
    if (length == 0) throw InputError("the prompt is empty");
    if (length >= context) {
      throw InputError("the prompt takes " + std::to_string(length) +
                       " tokens (images included); the model's context holds " + std::to_string(context));
    }
    tokens_ = std::move(prompt.token_ids);
    request_.emplace(engine_, std::move(prompt), std::min(sampling_.max_tokens, context - length), stats_);
    verdict_ = request_->judge(policy_);
    if (verdict_.action == Action::stop) {
      stats_.ttft_ms = clock.ms();
      return {policy_.refusal_text, std::nullopt, verdict_, "refused", std::nullopt};
    }
    Chunk chunk = choose(request_->begin(verdict_.strength));
    stats_.ttft_ms = clock.ms();
    return chunk;
  }

  Chunk continue_answer() {
    const Clock clock;
    std::vector<float> logits = request_->step(tokens_.back());
    stats_.decode_ms += clock.ms();
    return choose(std::move(logits));
  }

  /// The next token, and whether it is the last.
  Chunk choose(std::vector<float> logits) {
    const int64_t token = sample_(std::move(logits), tokens_);
    tokens_.push_back(token);
    ++stats_.completion_tokens;
    const auto& ends = engine_.manifest.prompt.end_token_ids;
    const bool end = std::find(ends.begin(), ends.end(), token) != ends.end();
    Chunk chunk{end ? "" : detokeniser_.push(token), token, verdict_, "", std::nullopt};
    if (end || detokeniser_.stopped) {
      chunk.finish_reason = "stop";
    } else if (stats_.completion_tokens == request_->max_tokens) {
      chunk.finish_reason = "length";
    }
    if (!chunk.finish_reason.empty()) chunk.text += detokeniser_.flush();
    return chunk;
  }

  const Engine& engine_;
  std::vector<Message> messages_;
  GatePolicy policy_;
  SamplingConfig sampling_;
  Sampler sample_;
  Detokeniser detokeniser_;
  Stats stats_;
  Verdict verdict_;
  std::vector<int64_t> tokens_;
  std::optional<Request> request_;
  bool ended_ = false;
};

inline Stream Engine::stream(std::vector<Message> messages, const SamplingConfig& sampling,
                             const GatePolicy& policy) const {
  return {*this, std::move(messages), sampling, policy};
}

inline Answer Engine::generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                               const std::function<void(const Chunk&)>& on_chunk) const {
  Answer answer;
  Stream pieces = stream(std::move(messages), sampling, policy);
  while (const std::optional<Chunk> chunk = pieces.next()) {
    answer.text += chunk->text;
    if (chunk->token) answer.token_ids.push_back(*chunk->token);
    answer.verdict = chunk->verdict;
    answer.finish_reason = chunk->finish_reason;
    if (chunk->stats) answer.stats = *chunk->stats;
    if (on_chunk) on_chunk(*chunk);
  }
  return answer;
}

}  // namespace autosteer
