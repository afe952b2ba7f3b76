// The audit record: what the gate made of each request, one JSON object a line. The C++ side of runtime/audit.py, with
// the same fields; docs/security.md has them.
//
// A record is written before the last piece of an answer is handed over, so no whole answer is without one. If it
// cannot be written, that request fails, and later ones are refused until it has been.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <exception>
#include <filesystem>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "digest.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "manifest.hpp"
#include "stats.hpp"
#include "text.hpp"

namespace autosteer {

/// A file to which lines are appended, by other threads and processes, too.
class AuditFile {
 public:
  /// Open the file, or make it for its owner alone. Throws InputError if it cannot be, or is no file.
  explicit AuditFile(const std::filesystem::path& path) {
    constexpr int kFlags = O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    file_ = open(path.c_str(), kFlags, S_IRUSR | S_IWUSR);
    const int error = errno;
    struct stat found {};
    if (file_ >= 0 && fstat(file_, &found) == 0 && S_ISREG(found.st_mode)) return;
    if (file_ < 0) {
      throw InputError(path.string() + ": the audit record cannot be opened (" + std::strerror(error) + ")");
    }
    close(file_);
    throw InputError(path.string() + ": not a file; an audit record is appended to one");
  }
  ~AuditFile() { close(file_); }
  AuditFile(const AuditFile&) = delete;
  AuditFile& operator=(const AuditFile&) = delete;

  /// Append a line, and wait until the disk has it. Throws Error, and leaves the file without the line.
  void append(const std::string& line) const {
    require(again([&] { return flock(file_, LOCK_EX); }));
    try {
      append_locked(line);
    } catch (...) {
      flock(file_, LOCK_UN);
      throw;
    }
    flock(file_, LOCK_UN);
  }

 private:
  /// A system call's result, once no signal interrupts it.
  template <class Call>
  static int again(const Call& call) {
    int result = 0;
    do {
      result = call();
    } while (result < 0 && errno == EINTR);
    return result;
  }

  void append_locked(std::string line) const {
    struct stat found {};
    require(fstat(file_, &found));
    if (found.st_nlink == 0) throw Error("its file was deleted");
    char last = '\n';
    if (found.st_size) require(pread(file_, &last, 1, found.st_size - 1));
    if (last != '\n') line.insert(line.begin(), '\n');  // somebody died in a line
    for (size_t done = 0; done < line.size();) {        // a second time only to learn why the disk did not take it all
      const ssize_t written = write(file_, line.data() + done, line.size() - done);
      if (written < 0 && errno != EINTR) take_back(found.st_size);
      done += static_cast<size_t>(std::max<ssize_t>(written, 0));
    }
    if (again([&] { return fsync(file_); }) != 0) take_back(found.st_size);
  }

  /// Throws Error for the system call that failed, once the file is as it was: the line is written again, and must not
  /// stand there twice.
  [[noreturn]] void take_back(off_t size) const {
    const int error = errno;
    if (ftruncate(file_, size) != 0) throw Error(std::string(std::strerror(error)) + ", in a line");
    throw Error(std::strerror(error));
  }

  /// Throws Error for a system call that failed.
  static void require(ssize_t result) {
    if (result < 0) throw Error(std::strerror(errno));
  }

  int file_ = -1;
};

/// Where the records of an engine go. Any thread may use it.
class Audit {
 public:
  const std::string package;  ///< the digest of its manifest, which has those of all its files
  const bool texts;           ///< whether records have the words of prompts and answers, beside their digests

  Audit(const std::filesystem::path& file, std::string package, bool texts)
      : package(std::move(package)), texts(texts), file_(file) {}

  /// Write what could not be written before. Throws AuditError if it still cannot.
  void require() {
    const std::lock_guard lock(mutex_);
    write();
  }

  /// Write a record. Throws AuditError if it cannot; `require` then tries again.
  void add(std::string line) {
    const std::lock_guard lock(mutex_);
    unwritten_.push_back(std::move(line));
    write();
  }

 private:
  void write() {
    try {
      for (; !unwritten_.empty(); unwritten_.pop_front()) file_.append(unwritten_.front());
    } catch (const std::exception& err) {
      throw AuditError(std::string("the audit record cannot be written, so the answer, or its end, is withheld (") +
                       err.what() + ")");
    }
  }

  const AuditFile file_;
  std::mutex mutex_;
  std::deque<std::string> unwritten_;
};

/// What is known of one request. Whoever has it calls `begin`, then `gave` for each piece, and `failed` if that ends.
class Record {
 public:
  static constexpr int kVersion = 1;

  /// `audit`: null writes nothing. What is referred to must outlive it.
  Record(Audit* audit, const GatePolicy& policy, const std::vector<Message>& messages, Stats& stats)
      : policy(policy), messages(messages), stats(stats), audit_(audit) {}

  const GatePolicy& policy;
  const std::vector<Message>& messages;
  Stats& stats;
  std::vector<Seen> seen;      ///< once the prompt is encoded
  std::vector<double> scores;  ///< p_unsafe of each judged turn
  std::optional<Verdict> verdict;

  /// Whether it is written.
  bool is_audited() const { return audit_ != nullptr; }

  /// The request begins. Throws AuditError if an earlier record is not written.
  void begin() {
    if (!audit_ || begun_) return;
    audit_->require();
    begun_ = std::chrono::system_clock::now();
    clock_ = Clock();
  }

  /// Note a piece of the answer that is handed over next. Throws AuditError if it is the last, and unwritten.
  void gave(const std::string& text, const std::string& finish_reason) {
    if (audit_) answer_ += text;
    if (!finish_reason.empty()) end(finish_reason, "");
  }

  /// `error` ended the request; or, if null, whoever asked.
  void failed(const std::exception_ptr& error) {
    if (!ended_) end("", error_name(error));
  }

 private:
  void end(const std::string& finish_reason, const std::string& error) {
    if (!audit_ || !begun_ || std::exchange(ended_, true)) return;
    audit_->add(json(finish_reason, error).dump(-1, ' ', true, OrderedJson::error_handler_t::replace) + "\n");
  }

  OrderedJson json(const std::string& finish_reason, const std::string& error) const {
    const auto word = [](const std::string& text) { return text.empty() ? OrderedJson() : OrderedJson(text); };
    const auto ms = [](double value) { return std::round(1000 * value) / 1000; };
    OrderedJson record = {{"version", kVersion},
                          {"time", time_of(*begun_)},
                          {"package", audit_->package},
                          {"provider", stats.device},
                          {"policy", name(policy.mode)},
                          {"threshold", policy.threshold},
                          {"pieces", policy.pieces},
                          {"judge_answers", policy.judge_answers},
                          {"p_unsafe", verdict ? or_null(verdict->p_unsafe) : OrderedJson()},
                          {"unsafe", verdict ? OrderedJson(verdict->unsafe) : OrderedJson()},
                          {"action", verdict ? OrderedJson(name(verdict->action)) : OrderedJson()},
                          {"strength", verdict ? OrderedJson(verdict->strength) : OrderedJson()},
                          {"answer_verdict", answer_verdict_json(verdict ? verdict->answer : std::nullopt)},
                          {"turns", turns()},
                          {"answer_sha256", sha256_of(answer_)}};
    if (audit_->texts) record["answer"] = answer_;
    record["finish_reason"] = word(finish_reason);
    record["error"] = word(error);
    record["prompt_tokens"] = stats.prompt_tokens;
    record["reused_tokens"] = stats.reused_tokens;
    record["completion_tokens"] = stats.completion_tokens;
    record["first_token_ms"] = stats.ttft_ms > 0 ? OrderedJson(ms(stats.ttft_ms)) : OrderedJson();
    record["total_ms"] = ms(clock_.ms());
    return record;
  }

  /// Each message. Pictures have no digest before the prompt is encoded.
  OrderedJson turns() const {
    OrderedJson turns = OrderedJson::array();
    auto score = scores.begin();
    size_t image = 0, video = 0;
    for (size_t i = 0; i < messages.size(); ++i) {
      const Message& message = messages[i];
      OrderedJson digests = OrderedJson::array(), words = digests, images = digests, videos = digests;
      for (const Part& part : message.parts) {
        if (const auto* text = std::get_if<std::string>(&part)) {
          digests.push_back(sha256_of(*text));
          words.push_back(*text);
        } else if (std::holds_alternative<VideoPart>(part)) {
          videos.push_back(or_null(digest_of(true, video++)));
        } else {
          images.push_back(or_null(digest_of(false, image++)));
        }
      }
      const bool known = message.role == "system" || message.role == "user" || message.role == "assistant";
      const bool scored = is_judged(messages, i) && score != scores.end();
      OrderedJson turn = {{"role", known ? OrderedJson(message.role) : OrderedJson()},
                          {"trusted", message.trusted},
                          {"p_unsafe", scored ? OrderedJson(*score++) : OrderedJson()},
                          {"text_sha256", digests}};
      if (audit_->texts) turn["text"] = words;
      turn["image_sha256"] = images;
      turn["video_sha256"] = videos;
      turns.push_back(turn);
    }
    return turns;
  }

  /// Of the `n`th picture or video that was encoded.
  std::optional<std::string> digest_of(bool video, size_t n) const {
    for (const Seen& one : seen) {  // of a video whose frames stand apart, its first group
      if (one.video == video && one.row == 0 && n-- == 0) return one.sha256;
    }
    return std::nullopt;
  }

  /// 2026-11-26T12:34:56.789Z
  static std::string time_of(std::chrono::system_clock::time_point time) {
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count();
    const std::time_t seconds = static_cast<std::time_t>(ms / 1000);
    std::tm utc{};
    gmtime_r(&seconds, &utc);
    char text[32];
    const size_t size = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    std::snprintf(text + size, sizeof text - size, ".%03dZ", static_cast<int>(ms % 1000));
    return text;
  }

  /// The word for what ended a request before its answer did. Never its message, which may quote the prompt.
  static std::string error_name(const std::exception_ptr& error) {
    if (!error) return "cancelled";
    try {
      std::rethrow_exception(error);
    } catch (const Cancelled&) {
      return "cancelled";
    } catch (const InputError&) {
      return "input";
    } catch (const PackageError&) {
      return "package";
    } catch (const ProviderError&) {
      return "provider";
    } catch (...) {
      return "failed";
    }
  }

  Audit* audit_;
  std::optional<std::chrono::system_clock::time_point> begun_;
  Clock clock_;
  std::string answer_;
  bool ended_ = false;
};

}  // namespace autosteer
