// autosteer-cli PACKAGE [--prompt TEXT] [--image FILE]... [--video FILE]...
//
// autosteer-run without Python: most of its options, its chat, --json and exit codes (docs/embedding.md). Answers go to
// stdout, verdicts and timings to stderr.
#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "json.hpp"

namespace {

const char* const kUsage = R"(Usage: autosteer-cli PACKAGE [OPTIONS]

  Answer a prompt with the model in PACKAGE, guarded by its gate.

  -p, --prompt TEXT            The prompt; '-' reads stdin. Without one: a chat on a terminal, else stdin.
  -i, --image FILE             A PNG or JPEG file; repeatable.
  --video FILE                 An MP4 or another file that ffmpeg reads, or a folder of PNG or JPEG files, ordered by
                               name; repeatable.
  --frames INTEGER             Number of frames to take from a longer video, evenly spaced.  [default: 8]
  --policy [steer|stop|report|off]
                               For an unsafe prompt: steer the answer towards a refusal, refuse outright, or only
                               report it; or no gate.  [default: steer]
  --threshold FLOAT            Unsafe above this p_unsafe. Default: the package's.
  --strength FLOAT             Strength of steering. Default: the package's.
  --pieces / --no-pieces       Also read the pieces of a turn, in which harmless words cannot hide a request, and judge
                               steered answers before they are shown. --no-pieces: prompts of several sentences start
                               two to three times as fast.  [on]
  --judge-answers / --no-judge-answers
                               Judge every answer as the dialogue's next turn before any of it is shown. Catches some
                               of what the prompt's gate misses; nothing streams.  [as the package says; off with
                               --no-pieces]
  --max-tokens INTEGER         Longest answer.  [default: 256]
  --temperature FLOAT          0 is greedy; above 1 the answer is judged before it is shown.  [default: 0]
  --top-k INTEGER              Sample from the k most likely tokens.  [0: all]
  --top-p FLOAT                Sample from the most likely tokens with this total probability.  [default: 1]
  --min-p FLOAT                Sample from tokens with this share of the likeliest one's probability.  [default: 0]
  --presence-penalty FLOAT     Subtracted from the logit of each token already in the answer.  [default: 0]
  --frequency-penalty FLOAT    Subtracted once for each time that the token is already in the answer.  [default: 0]
  --repetition-penalty FLOAT   Above 1 discourages repeats.  [default: 1]
  --seed INTEGER               Same seed, same text.  [default: 0]
  --stop TEXT                  End the answer before this string; repeatable.
  --speculation / --no-speculation
                               Draft tokens from the prompt and from autosteer-draft's table. Faster. At int8
                               and int4 an answer may differ where two tokens are almost equally likely.  [on]
  --max-tiles INTEGER          Cut a picture into at most this many tiles.  [no limit]
  --low-memory                 Load the image graph for each picture, and drop it afterwards.
  --audit FILE                 Append a line of JSON to this file for each request: verdict, digests, counts. If it
                               cannot be written, the request fails.
  --audit-texts                Also write the texts of prompts and answers to it.
  --device [auto|cpu|cuda]     Where to run; this build runs on the CPU.  [default: auto]
  --threads INTEGER            CPU threads. Default: one per usable CPU.
  --check                      Instead of a prompt, verify the files and replay the golden prompts on this machine.
  --json                       One JSON object on stdout.
  --version                    Show the versions of AutoSteer and of onnxruntime, and exit.
  -h, --help                   Show this and exit.
)";

/// The command line is wrong: exit code 2.
struct UsageError : autosteer::Error {
  explicit UsageError(const std::string& what) : Error(what, 2) {}
};

struct Arguments {
  std::optional<std::string> package, prompt;
  std::vector<autosteer::ImageLike> images;
  std::vector<std::string> videos;
  int64_t frames = autosteer::kFrames;
  std::string policy = "steer";
  std::optional<double> threshold, strength;
  bool pieces = true;
  std::optional<bool> judge_answers;
  autosteer::SamplingConfig sampling;
  autosteer::EngineOptions engine;
  bool json = false, check = false, version = false, help = false;
};

/// The option that sets a field: --max-tokens for max_tokens.
std::string option_of(std::string field) {
  std::replace(field.begin(), field.end(), '_', '-');
  return "--" + field;
}

double as_float(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end) throw UsageError("Invalid value for '" + option + "': '" + text + "' is not a float.");
  return value;
}

int64_t as_int(const std::string& option, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || errno) {
    throw UsageError("Invalid value for '" + option + "': '" + text + "' is not an integer.");
  }
  return value;
}

std::string as_one_of(const std::string& option, const std::string& text, const std::vector<std::string>& words) {
  for (const auto& word : words) {
    if (text == word) return text;
  }
  throw UsageError("Invalid value for '" + option + "': '" + text + "' is not a choice.");
}

void no_grammar(const std::string& option, const std::string&) {
  throw UsageError(option + ": autosteer-cli has no grammars; autosteer-run has.");
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  using Setter = std::function<void(const std::string& option, const std::string& value)>;
  autosteer::SamplingConfig& sampling = arguments.sampling;
  std::map<std::string, Setter> options = {
      {"--prompt", [&](auto&, auto& value) { arguments.prompt = value; }},
      {"--image", [&](auto&, auto& value) { arguments.images.emplace_back(autosteer::fs::path(value)); }},
      {"--video", [&](auto&, auto& value) { arguments.videos.push_back(value); }},
      {"--frames",
       [&](auto& o, auto& value) {
         arguments.frames = as_int(o, value);
         if (arguments.frames < 1) throw UsageError("Invalid value for '--frames': 1 or more.");
       }},
      {"--policy",
       [&](auto& o, auto& value) { arguments.policy = as_one_of(o, value, {"steer", "stop", "report", "off"}); }},
      {"--threshold", [&](auto& o, auto& value) { arguments.threshold = as_float(o, value); }},
      {"--strength", [&](auto& o, auto& value) { arguments.strength = as_float(o, value); }},
      {"--max-tokens", [&](auto& o, auto& value) { sampling.max_tokens = as_int(o, value); }},
      {"--temperature", [&](auto& o, auto& value) { sampling.temperature = as_float(o, value); }},
      {"--top-k", [&](auto& o, auto& value) { sampling.top_k = as_int(o, value); }},
      {"--top-p", [&](auto& o, auto& value) { sampling.top_p = as_float(o, value); }},
      {"--min-p", [&](auto& o, auto& value) { sampling.min_p = as_float(o, value); }},
      {"--presence-penalty", [&](auto& o, auto& value) { sampling.presence_penalty = as_float(o, value); }},
      {"--frequency-penalty", [&](auto& o, auto& value) { sampling.frequency_penalty = as_float(o, value); }},
      {"--json-schema", no_grammar},
      {"--regex", no_grammar},
      {"--repetition-penalty", [&](auto& o, auto& value) { sampling.repetition_penalty = as_float(o, value); }},
      {"--seed", [&](auto& o, auto& value) { sampling.seed = as_int(o, value); }},
      {"--stop", [&](auto&, auto& value) { sampling.stop.push_back(value); }},
      {"--max-tiles",
       [&](auto& o, auto& value) {
         arguments.engine.max_tiles = as_int(o, value);
         if (*arguments.engine.max_tiles < 1) throw UsageError("Invalid value for '--max-tiles': 1 or more.");
       }},
      {"--audit",
       [&](auto&, auto& value) {
         if (value.empty()) throw autosteer::InputError("--audit: the name of a file is needed");
         arguments.engine.audit = value;
       }},
      {"--device",
       [&](auto& o, auto& value) { arguments.engine.device = as_one_of(o, value, {"auto", "cpu", "cuda"}); }},
      {"--threads",
       [&](auto& o, auto& value) {
         arguments.engine.threads = as_int(o, value);
         if (arguments.engine.threads < 1) throw UsageError("Invalid value for '--threads': 1 or more.");
       }},
  };
  options["-p"] = options["--prompt"];
  options["-i"] = options["--image"];

  bool only_positional = false;
  for (size_t i = 0; i < words.size(); ++i) {
    std::string word = words[i];
    if (only_positional || word.size() < 2 || word[0] != '-') {
      if (arguments.package) throw UsageError("Got unexpected extra argument (" + word + ")");
      arguments.package = word;
      continue;
    }
    if (word == "--") {
      only_positional = true;
    } else if (word == "--json") {
      arguments.json = true;
    } else if (word == "--check") {
      arguments.check = true;
    } else if (word == "--audit-texts") {
      arguments.engine.audit_texts = true;
    } else if (word == "--low-memory") {
      arguments.engine.low_memory = true;
    } else if (word == "--pieces" || word == "--no-pieces") {
      arguments.pieces = word == "--pieces";
    } else if (word == "--judge-answers" || word == "--no-judge-answers") {
      arguments.judge_answers = word == "--judge-answers";
    } else if (word == "--speculation" || word == "--no-speculation") {
      sampling.speculate = word == "--speculation";
    } else if (word == "--version") {
      arguments.version = true;
    } else if (word == "--help" || word == "-h") {
      arguments.help = true;
    } else {
      std::optional<std::string> value;
      if (const size_t equals = word.find('='); word[1] == '-' && equals != std::string::npos) {
        value = word.substr(equals + 1);
        word.resize(equals);
      } else if (word[1] != '-' && word.size() > 2) {  // -pTEXT
        value = word.substr(2);
        word.resize(2);
      }
      const auto option = options.find(word);
      if (option == options.end()) throw UsageError("No such option: " + word);
      if (!value && ++i == words.size()) throw UsageError("Option '" + word + "' requires an argument.");
      option->second(word, value ? *value : words[i]);
    }
  }
  if (!arguments.package && !arguments.help && !arguments.version) throw UsageError("Missing argument 'PACKAGE'.");
  if (arguments.engine.audit_texts && arguments.engine.audit.empty()) {
    throw UsageError("--audit-texts needs --audit FILE");
  }
  return arguments;
}

/// Standard input without one line end at its end, which `echo` adds.
std::string read_stdin() {
  std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

/// [STEER  p_unsafe 0.993 > 0.500 at layer 6, strength 0.1]
std::string verdict_line(const autosteer::Verdict& verdict) {
  if (!verdict.p_unsafe) return "[no gate: --policy off]";
  const bool stopped_later = verdict.answer && !verdict.unsafe;  // then `answer_line` says so
  std::string action = autosteer::name(stopped_later ? autosteer::Action::pass : verdict.action);
  for (char& c : action) c = static_cast<char>(c - 'a' + 'A');
  const char* above = *verdict.p_unsafe > verdict.threshold ? ">" : "is no probability; limit";
  std::string line = "[" + action +
                     format("  p_unsafe %.3f %s %.3f at layer %d", *verdict.p_unsafe,
                            verdict.unsafe ? above : "<=", verdict.threshold, verdict.split_layer);
  if (verdict.action == autosteer::Action::steer) line += format(", strength %g", verdict.strength);
  if (verdict.unsafe && verdict.mode == autosteer::Mode::report) line += "; unsafe, but --policy report lets it pass";
  return line + "]";
}

/// [ANSWER STOPPED  p_unsafe 0.931 > 0.700]
std::string answer_line(const autosteer::AnswerVerdict& seen, const autosteer::Verdict& verdict) {
  const char* above = seen.p_unsafe > seen.threshold ? ">" : "is no probability; limit";
  std::string line = verdict.action == autosteer::Action::stop ? "[ANSWER STOPPED" : "[ANSWER";
  line += format("  p_unsafe %.3f %s %.3f", seen.p_unsafe, seen.unsafe ? above : "<=", seen.threshold);
  const bool passes = seen.unsafe && verdict.mode == autosteer::Mode::report;
  return line + (passes ? "; unsafe, but --policy report lets it pass]" : "]");
}

/// autosteer-cli 0.1.0 (onnxruntime 1.32.0)
std::string version_line() {
  const std::string ours = "autosteer-cli " AUTOSTEER_VERSION;
  try {
    return ours + " (onnxruntime " + autosteer::onnxruntime_version() + ")";
  } catch (const autosteer::ProviderError&) {
    return ours + " (no onnxruntime)";
  }
}

/// [52 + 7 tokens, first after 31 ms (vision 20, lower 6, gate 0.1, upper 4), then 410 tok/s, stop, on CPU...]
std::string stats_line(const std::string& finish_reason, const autosteer::Stats& stats) {
  const std::string upper = stats.upper_ms ? format("upper %.0f", *stats.upper_ms) : "decoder_upper never ran";
  const auto tok_s = stats.decode_tok_s();
  const auto count = [](int64_t n) { return std::to_string(n); };
  std::string drafts;
  if (stats.drafted_tokens) {
    drafts = " (" + count(stats.accepted_tokens) + " of " + count(stats.drafted_tokens) + " drafts accepted)";
  }
  const std::string reused = stats.reused_tokens ? " (" + count(stats.reused_tokens) + " cached)" : "";
  return "[" + count(stats.prompt_tokens) + reused + " + " + count(stats.completion_tokens) + drafts +
         format(" tokens, first after %.0f ms (vision %.0f, lower %.0f, gate %.1f, ", stats.ttft_ms, stats.vision_ms,
                stats.lower_ms, stats.gate_ms) +
         upper + ")" + (tok_s ? format(", then %.0f tok/s", *tok_s) : "") + ", " + finish_reason + ", on " +
         stats.device + "]";
}

/// Ctrl-C ends the answer that is being written, or the program if none is.
class Interrupts {
 public:
  /// From here on, and in threads that begin later.
  static void watch() {
    struct sigaction known {};
    sigaction(SIGINT, nullptr, &known);
    if (known.sa_handler == SIG_IGN) return;  // nohup, or a script's `&`
    sigset_t interrupt;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);
    std::thread([interrupt] {
      for (int signal = 0; sigwait(&interrupt, &signal) == 0;) end();
    }).detach();
  }

  /// While it lives, `answer` is what Ctrl-C ends.
  explicit Interrupts(autosteer::Stream& answer) { set(&answer); }
  ~Interrupts() { set(nullptr); }
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;

 private:
  static void set(autosteer::Stream* answer) {
    const std::lock_guard lock(mutex_);
    answer_ = answer;
  }

  static void end() {
    const std::lock_guard lock(mutex_);
    if (answer_) return answer_->cancel();
    _exit(write(STDERR_FILENO, kInterrupted, sizeof kInterrupted - 1) < 0 ? 1 : autosteer::Cancelled().exit_code);
  }

  static constexpr char kInterrupted[] = "\nautosteer-cli: interrupted\n";
  static inline std::mutex& mutex_ = *new std::mutex;  // the thread may wait for a signal while the program ends
  static inline autosteer::Stream* answer_ = nullptr;
};

/// Throws an Error if what was written to stdout did not get there: the disk is full, or its reader has gone.
void end_output() {
  if (!std::cout.flush()) throw autosteer::Error("stdout: the answer cannot be written (is the disk full?)");
}

/// Stream an answer: verdict and timings to stderr, text to stdout.
autosteer::Answer say(autosteer::Stream&& pieces) {
  const Interrupts ending(pieces);
  bool first = true;
  autosteer::Answer answer = pieces.whole([&](const autosteer::Chunk& chunk) {
    if (std::exchange(first, false)) std::cerr << verdict_line(chunk.verdict) << "\n";
    std::cout << chunk.text;
    end_output();
  });
  std::cout << std::endl;
  if (answer.verdict.answer) std::cerr << answer_line(*answer.verdict.answer, answer.verdict) << "\n";
  std::cerr << stats_line(answer.finish_reason, answer.stats) << "\n";
  return answer;
}

/// The path that was typed, or that a terminal wrote for a file dropped on it: quoted, or with backslashes.
std::string typed_path(std::string_view text) {
  std::string name(autosteer::strip(text));
  const bool quoted = name.size() > 1 && (name.front() == '\'' || name.front() == '"') && name.back() == name.front();
  if (std::error_code ignored; autosteer::fs::exists(name, ignored)) return name;
  if (quoted) {
    name = name.substr(1, name.size() - 2);
  } else {
    std::string plain;
    for (size_t i = 0; i < name.size(); ++i) plain += name[i] == '\\' && i + 1 < name.size() ? name[++i] : name[i];
    name = plain;
  }
  const char* home = std::getenv("HOME");
  return home && name.compare(0, 2, "~/") == 0 ? home + name.substr(1) : name;
}

/// A dialogue on the terminal. Pictures and videos go into the next turn that is answered. A turn that was steered or
/// stopped is forgotten: as part of the dialogue it would make every later turn unsafe.
void chat(const autosteer::Engine& engine, const Arguments& arguments, const autosteer::GatePolicy& policy,
          std::vector<autosteer::VideoPart> videos) {
  const char* const help =
      "Type a message. /image FILE or /video FILE adds to it, /new starts over, Ctrl-D leaves.\n";
  std::vector<autosteer::Message> dialogue;
  std::vector<autosteer::ImageLike> images = arguments.images;
  std::optional<autosteer::Conversation> conversation(std::in_place);
  std::cerr << help;
  for (std::string typed; std::cerr << "> ", std::getline(std::cin, typed);) {
    const std::string line(autosteer::strip(typed));
    const std::string command = line.substr(0, line.find(' ')), rest = line.substr(command.size());
    try {
      if (command == "/image") {
        if (!engine.manifest.image) throw autosteer::InputError("this model takes no images");
        const autosteer::ImageLike picture = autosteer::fs::path(typed_path(rest));
        autosteer::open_image(picture);  // open it now, so that a mistyped name does not fail every later turn
        images.push_back(picture);
      } else if (command == "/video") {
        if (!engine.manifest.video) throw autosteer::InputError("this model takes no videos");
        videos.push_back(autosteer::open_video(typed_path(rest), arguments.frames));
      } else if (command == "/new") {
        dialogue.clear(), images.clear(), videos.clear();
        conversation.emplace();
      } else if (command == "/help") {
        std::cerr << help;
      } else if (line[0] == '/') {
        std::cerr << command << ": not a command. " << help;
      } else if (!line.empty()) {
        dialogue.push_back(autosteer::Message::user(line, images, videos));
        const autosteer::Answer answer = say(engine.stream(dialogue, arguments.sampling, policy, &*conversation));
        if (answer.verdict.action == autosteer::Action::pass) {
          const bool unsafe = answer.verdict.answer && answer.verdict.answer->unsafe;  // under report
          const bool trusted = !unsafe && !arguments.sampling.answer_is_judged();
          dialogue.push_back(autosteer::Message::assistant(answer.text, trusted));
        } else {
          dialogue.pop_back();
          std::cerr << "(the turn is forgotten)\n";
        }
        images.clear(), videos.clear();
      }
    } catch (const autosteer::InputError& err) {  // the chat goes on after mistyped names and prompts that do not fit
      if (!dialogue.empty() && dialogue.back().role == "user") dialogue.pop_back();
      std::cerr << "error: " << err.what() << "\n";
    } catch (const autosteer::Cancelled&) {
      dialogue.pop_back();
      std::cerr << "\n(interrupted; the turn is forgotten)\n";
    }
  }
  std::cerr << "\n";
}

/// autosteer-check: replay the golden prompts. Throws an Error with exit code 6 if something differs.
void check(const Arguments& arguments) {
  const autosteer::Engine engine(*arguments.package, arguments.engine);
  const autosteer::Replay replay = autosteer::check_package(engine, *arguments.package);
  std::string failed;
  autosteer::OrderedJson lines = autosteer::OrderedJson::array();
  for (const autosteer::Check& line : replay.checks) {
    if (!line.passed) failed += (failed.empty() ? "" : ", ") + line.name;
    lines.push_back({{"name", line.name},
                     {"value", line.value},
                     {"limit", autosteer::or_null(line.limit)},
                     {"passed", line.passed}});
    if (arguments.json) continue;
    const std::string limit = line.limit ? format(" (limit %g)", *line.limit) : "";
    std::cout << format("%-6s %-46s %g", line.passed ? "ok" : "FAILED", line.name.c_str(), line.value) << limit << "\n";
  }
  if (arguments.json) {
    std::cout << autosteer::OrderedJson{{"package", *arguments.package}, {"checks", lines}}.dump() << "\n";
  }
  if (!failed.empty()) {
    constexpr int kCheckFailed = 6;
    throw autosteer::Error(
        *arguments.package + ": " + failed + ": not as on the exporting machine; do not deploy this package here" +
            replay.about_pictures,
        kCheckFailed);
  }
}

void run(const Arguments& arguments) {
  if (arguments.check) return check(arguments);
  arguments.sampling.check();
  const bool is_chat = !arguments.prompt && !arguments.json && isatty(STDIN_FILENO);
  const bool from_stdin = !is_chat && (!arguments.prompt || *arguments.prompt == "-");
  const std::string prompt = from_stdin ? read_stdin() : arguments.prompt.value_or("");
  const bool is_empty = std::all_of(prompt.begin(), prompt.end(), autosteer::is_space);
  if (!is_chat && is_empty && arguments.images.empty() && arguments.videos.empty()) {
    throw autosteer::InputError("the prompt is empty: give --prompt TEXT, or write it to stdin");
  }
  std::vector<autosteer::VideoPart> videos;
  for (const auto& video : arguments.videos) videos.push_back(autosteer::open_video(video, arguments.frames));
  autosteer::EngineOptions options = arguments.engine;  // a single text: no picture will need the image graph
  options.low_memory = options.low_memory || (!is_chat && arguments.images.empty() && videos.empty());
  const autosteer::Engine engine(*arguments.package, options);
  const auto policy = engine.policy(autosteer::mode_from(arguments.policy), arguments.threshold,
                                    arguments.strength, arguments.pieces, arguments.judge_answers);
  if (is_chat) {
    return chat(engine, arguments, policy, std::move(videos));
  }
  std::vector<autosteer::Message> dialogue = {autosteer::Message::user(prompt, arguments.images, videos)};
  autosteer::Stream pieces = engine.stream(std::move(dialogue), arguments.sampling, policy);
  if (arguments.json) {
    const Interrupts ending(pieces);
    std::cout << answer_json(pieces.whole()).dump() << "\n";
  } else {
    say(std::move(pieces));
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int fd = 0; fd < 3; ++fd) {  // what is closed would be the next file opened: the audit record, say
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
  }
  std::signal(SIGPIPE, SIG_IGN);  // a reader that has gone, or a full quota, is an error, and audited
  std::signal(SIGXFSZ, SIG_IGN);
  // Give memory back to the system as soon as onnxruntime frees it, while it packs weights: an eighth less at the peak.
  mallopt(M_MMAP_THRESHOLD, 1 << 18);
  const char* said = std::getenv("ORT_DISABLE_TELEMETRY");  // runtime/__init__.py says why
  if (!said || !*said) setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite*/ 1);
  try {
    Interrupts::watch();
    Arguments arguments = parse({argv + 1, argv + argc});
    if (arguments.help) {
      std::cout << kUsage;
      end_output();
      return 0;
    }
    if (arguments.version) {
      std::cout << version_line() << "\n";
      end_output();
      return 0;
    }
    autosteer::set_log([](const std::string& line) { std::cerr << line << "\n"; });
    arguments.engine.log = autosteer::log_line;
    arguments.engine.advise_pages = true;  // all of this process's memory is ours
    run(arguments);
    end_output();
    return 0;
  } catch (const UsageError& err) {
    std::cerr << "Usage: autosteer-cli PACKAGE [OPTIONS]\nTry 'autosteer-cli --help' for help.\n\nError: " << err.what()
              << "\n";
    return err.exit_code;
  } catch (const autosteer::Cancelled& err) {
    std::cerr << "\nautosteer-cli: interrupted\n";
    return err.exit_code;
  } catch (const autosteer::OptionError& err) {
    std::cerr << "autosteer-cli: error: " << option_of(err.field) << err.problem << "\n";
    return err.exit_code;
  } catch (const autosteer::Error& err) {
    std::cerr << "autosteer-cli: error: " << err.what() << "\n";
    return err.exit_code;
  } catch (const std::exception& err) {
    std::cerr << "autosteer-cli: error: " << err.what() << "\n";
    return 1;
  }
}
