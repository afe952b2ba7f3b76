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
// Prefill is layer-major: decoder_lower runs over the whole prompt, the prober reads its output, and only then does
// decoder_upper run. The gate changes the head and never the caches, so this computes the same as running layer by
// layer. A stopped prompt costs k/N of prefill and no decoding.
//
// If an answer copies from its prompt, the decoder verifies several tokens per pass (drafting.hpp).
//
// All state belongs to a Request (generation.hpp) or to the Conversation that you pass. One Engine may serve several
// threads; a Stream and a Conversation belong to one.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "conversation.hpp"
#include "drafting.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "pages.hpp"
#include "sampling.hpp"
#include "self_test.hpp"
#include "subgraph.hpp"
#include "text.hpp"
#include "tokenizer.hpp"
#include "video.hpp"

namespace autosteer {

constexpr int64_t kTilesPerRun = 2;    // bounds the image graph's activations
constexpr int64_t kMaxThreads = 1024;  // more is taken for a typing error

/// A piece of an answer. `text` is empty while a character is incomplete.
struct Chunk {
  std::string text;
  std::optional<int64_t> token;  ///< absent for the refusal text of Mode::stop
  Verdict verdict;
  std::string finish_reason;   ///< "stop", "length" or "refused" on the last chunk, else empty
  std::optional<Stats> stats;  ///< on the last chunk
};

/// A whole answer, as `generate` returns it.
struct Answer {
  std::string text;
  std::vector<int64_t> token_ids;  ///< with the end-of-turn token if the model wrote one
  Verdict verdict;
  std::string finish_reason;
  Stats stats;
};

/// How to load a package.
struct EngineOptions {
  std::string device = "auto";            ///< auto or cpu
  int threads = 0;                        ///< 0: every CPU this process may use
  std::optional<int64_t> max_tiles = {};  ///< cut a picture into at most this many tiles
  bool low_memory = false;                ///< check and load the image graph for each picture, then drop it
  bool files = true;                      ///< whether messages may name files of pictures
  bool advise_pages = false;              ///< advise Linux on the process's memory while loading (pages.hpp)
  std::string onnxruntime = {};           ///< path of libonnxruntime.so; "": find_onnxruntime() says where it is
  Log log = {};                           ///< receives the reason if a prober fails; never prompts
};

class Stream;

/// A loaded package.
class Engine {
  std::unique_ptr<Pages> pages_;  // first member: it sees what the others load; null: not asked for

 public:
  /// Check every file of `folder` against the manifest's hashes and load it.
  /// Throws PackageError (package damaged or incomplete, another version, a gate that does not work here) or
  /// ProviderError (device not available, onnxruntime too old).
  explicit Engine(const fs::path& folder, const EngineOptions& options = {})
      : pages_(options.advise_pages ? std::make_unique<Pages>() : nullptr),
        manifest(Manifest::load(folder)),
        log(options.log),
        tokenizer(checked(folder, options.onnxruntime)),
        folder_(folder),
        files_(options.files) {
    if (manifest.image) image = at_most(*manifest.image, options.max_tiles);
    if (options.device != "auto" && options.device != "cpu") {
      throw ProviderError("--device " + options.device + ": the C++ runtime binds CPU buffers only; use --device cpu");
    }
    environment_.emplace(options.threads > 0 ? options.threads : usable_cpus());
    const auto load = [&](const std::string& name, const GraphSpec& spec) {
      if (options.low_memory && kImageGraphs.count(name)) return;
      graphs_.try_emplace(name, *environment_, folder / spec.file, spec);
      if (spec.layers && pages_) pages_->give_back();  // before the next large graph loads
    };
    // First the graphs whose loading peaks highest, while nothing else is in memory.
    for (const char* name : {"vision_encoder", "image_tokenizer", "lm_head"}) {
      if (const auto found = manifest.graphs.find(name); found != manifest.graphs.end()) load(name, found->second);
    }
    for (const auto& [name, spec] : manifest.graphs) load(name, spec);
    check_gate(folder, manifest, graphs_);
    if (pages_) pages_->place();
  }

  /// The package's policy with your overrides. Throws PackageError if `mode` needs a gate and the package has none,
  /// InputError for numbers out of range.
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

  /// Answer a dialogue in chunks; each carries the verdict. With a `conversation` only what is new in the dialogue is
  /// computed. Nothing runs before the first `next()`. The engine and the conversation must outlive the stream. Throws
  /// InputError if the conversation belongs to another engine.
  Stream stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                Conversation* conversation = nullptr) const;

  /// The whole answer at once. `on_chunk`, if given, is called with every chunk.
  Answer generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                  const std::function<void(const Chunk&)>& on_chunk = {}, Conversation* conversation = nullptr) const;

  /// The verdict on a dialogue, without an answer: decoder_upper never runs. Throws InputError if the prompt, an image
  /// or a video is unusable, or does not fit the context.
  Verdict score(const std::vector<Message>& messages, const GatePolicy& policy) const {
    policy.check();
    Stats stats;
    return request(prepare(messages, stats), 1, stats).prefill_lower(policy);
  }

  /// `generate` for a prompt of one user turn without pictures, given as the token ids of the whole rendered prompt.
  Answer generate_from_ids(const std::vector<int64_t>& token_ids, const SamplingConfig& sampling,
                           const GatePolicy& policy) const;

  /// Encode such a prompt.
  EncodedPrompt prepare_ids(const std::vector<int64_t>& token_ids, Stats& stats) const {
    const Clock clock;
    check_length(static_cast<int64_t>(token_ids.size()));
    std::vector<JudgedTurn> turns;
    render({{"user", {}}}, manifest.prompt, tokenizer, turns);
    turns.at(0).end = {static_cast<int64_t>(token_ids.size()), 0};  // the rendering ends where the prompt does
    EncodedPrompt prompt{embed(token_ids), token_ids, {}, {}};
    std::vector<int64_t> text(token_ids.size());
    std::iota(text.begin(), text.end(), int64_t{0});
    for (const int64_t id : token_ids) prompt.keys.emplace_back("", id);
    prompt.probed = probed_positions(turns, text, {});
    stats.embed_ms = clock.ms();
    stats.prompt_tokens = prompt.inputs_embeds.count();
    return prompt;
  }

  /// Render a dialogue, encode its images and videos, and lay everything out as the decoder's input. What does not fit
  /// the context is refused before anything is embedded. Throws InputError for that, and for an unusable message, image
  /// or video.
  EncodedPrompt prepare(const std::vector<Message>& messages, Stats& stats,
                        Conversation* conversation = nullptr) const {
    check_parts(messages);
    std::vector<JudgedTurn> turns;
    const std::vector<Run> runs = render(messages, manifest.prompt, tokenizer, turns);
    const Clock seeing;
    const std::vector<Seen> seen = see(runs, messages, stats, conversation);
    stats.vision_ms = seeing.ms();
    const Clock clock;
    EncodedPrompt prompt{{manifest.dims.hidden_size, {}}, {}, {}, {}};
    std::vector<int64_t> text_positions, sizes;
    const auto add_tokens = [&](const std::vector<int64_t>& ids) {
      const Rows rows = embed(ids);
      for (const int64_t id : ids) {
        text_positions.push_back(static_cast<int64_t>(prompt.keys.size()));
        prompt.keys.emplace_back("", id);
      }
      prompt.inputs_embeds.append(rows.row(0), rows.count());
      prompt.token_ids.insert(prompt.token_ids.end(), ids.begin(), ids.end());
    };
    auto next = seen.begin();
    for (const Run& run : runs) {
      if (run.slot.empty()) {
        add_tokens(run.ids);
        continue;
      }
      int64_t row = 0;
      for (const Laid& part : *next->laid) {
        add_tokens(part.ids);
        prompt.inputs_embeds.append(part.rows.row(0), part.rows.count());
        for (int64_t i = 0; i < part.rows.count(); ++i) prompt.keys.emplace_back(next->digest, row++);
      }
      sizes.push_back(next++->rows());
    }
    prompt.probed = probed_positions(turns, text_positions, sizes);
    stats.embed_ms = clock.ms();
    stats.prompt_tokens = prompt.inputs_embeds.count();
    return prompt;
  }

  /// One image -> its rows, with the token ids around and between them.
  std::vector<Laid> encode_image(const Image& picture, bool alone, Stats& stats) const {
    const ImageSpec& spec = image.value();
    const Tiles tiles = cut(picture, spec, alone);
    const Rows pixel_values = normalise(tiles.images, spec);
    std::vector<Rows> rows;
    if (manifest.graphs.count("image_tokenizer")) {
      rows.push_back(embed(tokenize_image(pixel_values)));
    } else {
      rows = encode_tiles(pixel_values, picture.height, picture.width);
    }
    stats.image_tiles += pixel_values.count();
    return lay_out(std::move(rows), tiles.grid, spec);
  }

  /// Throws InputError for pictures and videos that this model cannot take, before any is opened.
  void check_parts(const std::vector<Message>& messages) const {
    int64_t films = 0, frames = 0, rows = 0;
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        if (std::holds_alternative<ImageLike>(part) && !manifest.image) throw InputError("this model takes no images");
        const auto* video = std::get_if<VideoPart>(&part);
        if (!video) continue;
        if (!manifest.video) throw InputError("this model takes no videos");
        if (video->frames.empty()) throw InputError("a video has no frames");
        const auto count = static_cast<int64_t>(video->frames.size());
        ++films;
        frames += count;
        rows += count * manifest.video->pooled_side * manifest.video->pooled_side + 1;
      }
    }
    if (films && rows >= manifest.dims.context_length) {
      throw InputError("the video takes " + std::to_string(rows) + " tokens (" + std::to_string(frames) +
                       " frames); the model's context holds " + std::to_string(manifest.dims.context_length) +
                       "; take fewer frames");
    }
  }

  /// Throws InputError for a picture that is the name of a file, where EngineOptions::files forbids them.
  void check_files(const std::vector<Message>& messages) const {
    const auto is_file = [](const ImageLike& image) { return std::holds_alternative<fs::path>(image); };
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        const auto* image = std::get_if<ImageLike>(&part);
        const auto* video = std::get_if<VideoPart>(&part);
        const bool named = (image && is_file(*image)) ||
                           (video && std::any_of(video->frames.begin(), video->frames.end(), is_file));
        if (named && !files_) throw InputError("a picture is the name of a file, which this engine does not open");
      }
    }
  }

  /// Tokens of the prompt that these messages become, those of pictures and videos included. The decoder does not run.
  int64_t count_tokens(const std::vector<Message>& messages) const {
    check_files(messages);
    Stats stats;
    return prepare(messages, stats).inputs_embeds.count();
  }

  /// Throws InputError for a prompt of `length` tokens, or of at least as many, that does not fit the context.
  void check_length(int64_t length, bool exact = true) const {
    if (length == 0) throw InputError("the prompt is empty");
    if (length >= manifest.dims.context_length) {
      throw InputError(std::string("the prompt takes ") + (exact ? "" : "at least ") + std::to_string(length) +
                       " tokens (images included); the model's context holds " +
                       std::to_string(manifest.dims.context_length));
    }
  }

  /// The frames of a video, one tile each.
  std::vector<Image> tiles(const VideoPart& video) const {
    std::vector<Image> tiles;
    for (const ImageLike& frame : video.frames) tiles.push_back(squeeze(open_image(frame), image.value().tile_size));
    return tiles;
  }

  /// A video's tiles -> its rows: pooled rows of each frame, and one newline row at the very end.
  Rows encode_video(const std::vector<Image>& frames, Stats& stats) const {
    const int64_t depth = manifest.dims.hidden_size, side = image.value().anyres.value().tokens_per_side;
    Rows rows{depth, {}}, newline{depth, {}};
    for (size_t first = 0; first < frames.size(); first += kTilesPerRun) {
      const size_t end = std::min<size_t>(first + kTilesPerRun, frames.size());
      const std::vector<Image> tiles(frames.begin() + static_cast<std::ptrdiff_t>(first),
                                     frames.begin() + static_cast<std::ptrdiff_t>(end));
      const Rows pixel_values = normalise(tiles, manifest.video.value());
      run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t count, const auto& outputs) {
        const int64_t all = count * side * side;
        Rows features{depth, {}};
        features.append(floats(outputs.at("image_features"), all * depth, graph), all);
        const Rows pooled = pool(features, side, manifest.video->pooled_side);
        rows.append(pooled.row(0), pooled.count());
        newline.data.clear();
        newline.append(floats(outputs.at("image_newline"), depth, graph), 1);
      });
    }
    rows.append(newline.row(0), 1);
    stats.image_tiles += static_cast<int64_t>(frames.size());
    return rows;
  }

  /// pixel_values (tiles, 3 * size * size) of one image -> its token ids, in order.
  std::vector<int64_t> tokenize_image(const Rows& pixel_values) const {
    std::vector<int64_t> ids;
    run_tiles("image_tokenizer", pixel_values, [&](const Subgraph& graph, int64_t, const auto& outputs) {
      const auto [found, count] = values<int64_t>(outputs.at("input_ids"), graph);
      ids.insert(ids.end(), found, found + count);
    });
    return ids;
  }

  /// pixel_values (tiles, 3 * size * size) of one image (height, width) -> its runs of rows (n, D): one for each tile,
  /// or a single one for `anyres`, which joins the tiles.
  std::vector<Rows> encode_tiles(const Rows& pixel_values, int64_t height, int64_t width) const {
    const ImageSpec& spec = image.value();
    const int64_t depth = manifest.dims.hidden_size;
    std::vector<Rows> runs;
    Rows newline{depth, {}};
    run_tiles("vision_encoder", pixel_values, [&](const Subgraph& graph, int64_t tiles, const auto& outputs) {
      const auto [features, count] = values<float>(outputs.at("image_features"), graph);
      const int64_t each =
          spec.anyres ? spec.anyres->tokens_per_side * spec.anyres->tokens_per_side : count / (tiles * depth);
      floats(outputs.at("image_features"), tiles * each * depth, graph);  // checks the size
      for (int64_t tile = 0; tile < tiles; ++tile) {
        runs.push_back({depth, {features + tile * each * depth, features + (tile + 1) * each * depth}});
      }
      if (spec.anyres && newline.data.empty()) newline.append(floats(outputs.at("image_newline"), depth, graph), 1);
    });
    if (!spec.anyres) return runs;
    Rows together{depth, {}};
    for (const Rows& run : runs) together.append(run.row(0), run.count());
    return {pack(together, newline, height, width, spec)};
  }

  /// Run an image graph, a few tiles at a time. If low_memory left it out, verify the package and load it for this
  /// call.
  template <class Use>
  void run_tiles(const char* name, const Rows& pixel_values, const Use& use) const {
    const int64_t size = image.value().tile_size;
    std::optional<Subgraph> for_now;
    if (!graphs_.count(name)) {
      manifest.verify(folder_);
      const GraphSpec& spec = manifest.graphs.at(name);
      for_now.emplace(*environment_, folder_ / spec.file, spec);
    }
    const Subgraph& encoder = for_now ? *for_now : graph(name);
    for (int64_t first = 0; first < pixel_values.count(); first += kTilesPerRun) {
      const int64_t tiles = std::min(kTilesPerRun, pixel_values.count() - first);
      use(encoder, tiles, encoder.run(Tensor<float>::view(pixel_values.row(first), {tiles, 3, size, size})));
    }
  }

  /// Token ids (n) -> their embeddings (n, D), a few at a time: onnxruntime's arena keeps the memory of its largest
  /// run.
  Rows embed(const std::vector<int64_t>& token_ids) const {
    const Subgraph& table = graph("embed_tokens");
    const auto size = static_cast<int64_t>(token_ids.size());
    Rows rows{manifest.dims.hidden_size, {}};
    rows.data.reserve(token_ids.size() * static_cast<size_t>(rows.width));
    for (int64_t first = 0; first < size; first += kPrefillChunk) {
      const int64_t n = std::min(kPrefillChunk, size - first);
      const auto outputs = table.run(Tensor<int64_t>::view(token_ids.data() + first, {1, n}));
      rows.append(floats(outputs.at("inputs_embeds"), n * rows.width, table), n);
    }
    return rows;
  }

  /// Buffers and caches for one answer. Throws InputError if the prompt does not fit the context.
  Request request(EncodedPrompt prompt, int64_t max_tokens, Stats& stats, Conversation* conversation = nullptr) const {
    const int64_t length = prompt.inputs_embeds.count(), context = manifest.dims.context_length;
    check_length(length);
    return {manifest,
            graphs_,
            log,
            std::move(prompt),
            std::min(max_tokens, context - length),
            stats,
            conversation ? conversation->take_prefix() : std::nullopt};
  }

  const Subgraph& graph(const std::string& name) const { return graphs_.at(name); }

  const Manifest manifest;
  std::optional<ImageSpec> image;  ///< the manifest's, with the grids that EngineOptions::max_tiles leaves
  const Log log;
  const Tokenizer tokenizer;

 private:
  /// A picture or a video of a prompt.
  struct Seen {
    std::string digest;
    std::shared_ptr<const std::vector<Laid>> laid;

    int64_t rows() const {
      int64_t count = 0;
      for (const Laid& part : *laid) count += static_cast<int64_t>(part.ids.size()) + part.rows.count();
      return count;
    }
  };

  /// The dialogue's pictures and videos, in the order of `runs`. One is opened and encoded after the other, so one is
  /// in memory at a time; and only as long as they fit the context. What is shown twice, or what the conversation
  /// knows, is not encoded again.
  std::vector<Seen> see(const std::vector<Run>& runs, const std::vector<Message>& messages, Stats& stats,
                        Conversation* conversation) const {
    std::vector<const ImageLike*> pictures;
    std::vector<const VideoPart*> films;
    for (const Message& message : messages) {
      for (const Part& part : message.parts) {
        if (const auto* picture = std::get_if<ImageLike>(&part)) pictures.push_back(picture);
        if (const auto* film = std::get_if<VideoPart>(&part)) films.push_back(film);
      }
    }
    const int64_t least = least_rows();
    int64_t length = static_cast<int64_t>(pictures.size()) * least;
    for (const Run& run : runs) length += static_cast<int64_t>(run.ids.size());
    check_length(length, pictures.empty());
    Encoded encoded;
    const auto take = [&](const std::string& digest, const std::function<std::vector<Laid>()>& encode) {
      auto& laid = encoded[digest];
      if (!laid && conversation && conversation->images.count(digest)) laid = conversation->images[digest];
      if (!laid) laid = std::make_shared<const std::vector<Laid>>(encode());
      return Seen{digest, laid};
    };
    std::vector<Seen> seen;
    size_t shown = 0, filmed = 0;
    for (const Run& run : runs) {
      if (run.slot == "image") {
        const bool alone = pictures.size() == 1;
        const Image picture = open_image(*pictures.at(shown++));
        seen.push_back(take(digest(&picture, 1, alone ? "a picture" : "one of several"),
                            [&] { return encode_image(picture, alone, stats); }));
        length += seen.back().rows() - least;
      } else if (run.slot == "video") {
        const std::vector<Image> frames = tiles(*films.at(filmed++));
        seen.push_back(take(digest(frames.data(), frames.size(), "a video"),
                            [&] { return std::vector<Laid>{{{}, encode_video(frames, stats)}}; }));
        length += seen.back().rows();
      }
      check_length(length, seen.size() == pictures.size() + films.size());
    }
    if (conversation) conversation->images = encoded;
    return seen;
  }

  /// Rows of the smallest picture: those of one tile.
  int64_t least_rows() const {
    for (const auto& [name, output] : kImageGraphs) {
      const auto graph = manifest.graphs.find(name);
      if (graph == manifest.graphs.end()) continue;
      for (const TensorSpec& tensor : graph->second.outputs) {
        if (tensor.name != output || tensor.shape.size() < 2) continue;
        if (const auto* rows = std::get_if<int64_t>(&tensor.shape[1])) return *rows;
      }
    }
    return 1;
  }

  /// For each turn the positions that the prober reads, ascending: the same as if the dialogue ended there. None where
  /// a turn is too short, or where the text that follows changed the tokens that the prober would have read. Without a
  /// prober, the last position: a conversation continues from it. `text`: the positions of token ids. `sizes`: the rows
  /// of each picture and video, separators included. A mean leaves out pictures: their many rows would outweigh the
  /// text.
  std::vector<std::vector<int64_t>> probed_positions(const std::vector<JudgedTurn>& turns,
                                                     const std::vector<int64_t>& text,
                                                     const std::vector<int64_t>& sizes) const {
    std::vector<int64_t> before = {0};  // rows of the first n pictures and videos
    for (const int64_t size : sizes) before.push_back(before.back() + size);
    const auto row = [&](const Place& place) { return place.tokens + before.at(place.slots); };
    const auto& prober = manifest.prober;
    const int64_t offset = prober ? prober->token_offset : -1, length = row(turns.back().end);
    std::vector<std::vector<int64_t>> probed;
    for (auto turn = prober ? turns.begin() : turns.end() - 1; turn != turns.end(); ++turn) {
      const int64_t last = row(turn->end) + offset;
      probed.emplace_back();
      if (last < 0 || last >= length || offset >= -turn->unlike) continue;
      if (!prober || prober->pooling == "last") {
        probed.back().push_back(last);
      } else {
        const auto first = std::lower_bound(text.begin(), text.end(), row(turn->content));
        const auto end = std::upper_bound(text.begin(), text.end(), last);
        if (first < end) probed.back().assign(first, end);
      }
    }
    return probed;
  }

  /// Check every file of the package; the tokenizer's path.
  fs::path checked(const fs::path& folder, const std::string& onnxruntime) const {
    find_onnxruntime(onnxruntime);
    require_onnxruntime(manifest.onnxruntime);
    manifest.verify(folder);
    return folder / manifest.prompt.tokenizer;
  }

  static int usable_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
    return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
  }

  const fs::path folder_;
  const bool files_;
  std::optional<Environment> environment_;
  Graphs graphs_;
};

/// An answer in chunks: call `next` until it returns nothing.
class Stream {
 public:
  using Prepare = std::function<EncodedPrompt(Stats&)>;  ///< encodes the prompt when the first chunk is requested

  Stream(const Engine& engine, Prepare prepare, const SamplingConfig& sampling, GatePolicy policy,
         Conversation* conversation)
      : engine_(engine),
        conversation_(conversation),
        prepare_(std::move(prepare)),
        policy_(std::move(policy)),
        sampling_(sampling),
        sample_(sampling),
        detokeniser_(engine.tokenizer, sampling.stop) {
    if (conversation && !conversation->belongs_to(engine)) {
      throw InputError("this conversation was begun with another engine");
    }
    sampling.check();
    policy_.check();
    for (const std::string& stop : sampling.stop) {
      if (!unicode::is_valid(stop)) throw InputError("a stop string is not valid Unicode text");
    }
  }

  ~Stream() {
    try {
      leave();
    } catch (...) {  // no memory to keep the prefix: the conversation's next request computes all
    }
  }
  Stream(const Stream&) = delete;  // the request points into it
  Stream& operator=(const Stream&) = delete;

  /// The next chunk. Throws InputError if the prompt, an image or a video is unusable, or does not fit the context.
  /// After an exception the stream has ended.
  std::optional<Chunk> next() {
    if (ended_) return std::nullopt;
    ended_ = true;  // also if this call throws
    Chunk chunk = cancellation_.guard([&] { return request_ ? continue_answer() : begin_answer(); });
    ended_ = !chunk.finish_reason.empty();
    if (ended_) {
      chunk.stats = stats_;
      leave();
    }
    return chunk;
  }

  /// End the answer: a `next` that is running throws Cancelled soon, and so does the next one. For any thread.
  void cancel() { cancellation_.cancel(); }

 private:
  /// End the answer, and give the cached prefix back to the conversation.
  void leave() {
    if (request_ && conversation_) conversation_->keep_prefix(request_->cached_prefix());
    request_.reset();
  }

  Chunk begin_answer() {
    const Clock clock;
    EncodedPrompt prompt = prepare_(stats_);
    tokens_ = prompt.token_ids;
    request_.emplace(engine_.request(std::move(prompt), sampling_.max_tokens, stats_, conversation_));
    prompt_tokens_ = tokens_.size();
    verdict_ = request_->prefill_lower(sampling_.restricts() ? without_steering(policy_) : policy_);
    if (verdict_.action == Action::stop) {
      stats_.ttft_ms = clock.ms();
      return {policy_.refusal_text, std::nullopt, verdict_, "refused", std::nullopt};
    }
    if (sampling_.speculate) {
      drafter_.emplace(tokens_, kPositionCost.at(engine_.manifest.graphs.at("decoder_lower").precision));
    }
    logits_ = request_->prefill_upper(verdict_.strength);
    Chunk chunk = choose();
    stats_.ttft_ms = clock.ms();
    return chunk;
  }

  Chunk continue_answer() {
    const Clock clock;
    const int64_t token = tokens_.back();
    if (drafter_) drafter_->push(token);
    if (row_ < draft_.size() && draft_[row_] == token) {
      request_->accept_draft();
      ++stats_.accepted_tokens;
      ++row_;
    } else {
      draft_.clear();
      if (drafter_) draft_ = drafter_->draft(request_->max_tokens - stats_.completion_tokens - 1);
      stats_.drafted_tokens += static_cast<int64_t>(draft_.size());
      std::vector<int64_t> fed = {token};
      fed.insert(fed.end(), draft_.begin(), draft_.end());
      logits_ = request_->verify_draft(fed);
      row_ = 0;
    }
    stats_.decode_ms += clock.ms();
    return choose();
  }

  /// Sample the next token; its chunk.
  Chunk choose() {
    const auto vocabulary = static_cast<size_t>(engine_.manifest.dims.vocab_size);
    const float* row = logits_ + row_ * vocabulary;
    const int64_t token = sample_({row, row + vocabulary}, tokens_, prompt_tokens_);
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
  Conversation* conversation_;
  Prepare prepare_;
  GatePolicy policy_;
  SamplingConfig sampling_;
  Sampler sample_;
  Detokeniser detokeniser_;
  Stats stats_;
  Verdict verdict_;
  std::vector<int64_t> tokens_;
  size_t prompt_tokens_ = 0;  // of them
  std::optional<Request> request_;
  std::optional<Drafter> drafter_;
  std::vector<int64_t> draft_;
  const float* logits_ = nullptr;  // (R, V) of the latest pass
  size_t row_ = 0;                 // the one to sample from
  Cancellation cancellation_;
  bool ended_ = false;
};

inline Stream Engine::stream(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                             Conversation* conversation) const {
  check_files(messages);
  const auto prepare = [this, messages = std::move(messages), conversation](Stats& stats) {
    return this->prepare(messages, stats, conversation);
  };
  return {*this, prepare, sampling, policy, conversation};
}

namespace detail {

/// All chunks of a stream as one answer.
inline Answer whole(Stream pieces, const std::function<void(const Chunk&)>& on_chunk = {}) {
  Answer answer;
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

}  // namespace detail

inline Answer Engine::generate(std::vector<Message> messages, const SamplingConfig& sampling, const GatePolicy& policy,
                               const std::function<void(const Chunk&)>& on_chunk, Conversation* conversation) const {
  return detail::whole(stream(std::move(messages), sampling, policy, conversation), on_chunk);
}

inline Answer Engine::generate_from_ids(const std::vector<int64_t>& token_ids, const SamplingConfig& sampling,
                                        const GatePolicy& policy) const {
  const auto prepare = [&](Stats& stats) { return prepare_ids(token_ids, stats); };
  return detail::whole(Stream(*this, prepare, sampling, policy, nullptr));
}

}  // namespace autosteer
