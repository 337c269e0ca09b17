// A layer's attention for all rows of a step: norms of heads, rotation, keys and values into their slots, then every row
// over the positions it sees, straight over the block table.
//
//     positions  0 ......... 512 ......... 1024 ....... context         segments, counted from position 0
//                |----- segment ----|----- segment ----|--|
//
// A segment has a softmax of its own; segments are then merged in order. So a row's arithmetic is the same whether it is
// alone or one of 512, whatever the threads, and wherever the blocks lie. An item of work is some rows of one chunk and one
// kv head, with all query heads that share it; where there are few, an item is cut between segments, and who finishes
// last merges.
// This file does not know layers' order or weights.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"

using namespace attention;

namespace {

// Mirrored in attention.py.
struct Chunk {
    int64_t first_row, num_rows, start, first_block;
};
struct Step {
    int64_t dtype;  // 0 f32, 1 bf16, 2 f16
    int64_t num_rows, num_heads, num_kv_heads, head_dim;
    int64_t num_slots, block_size, num_chunks, num_pairs;
    const Chunk* chunks;
    const int64_t* blocks;
    const int64_t* slots;  // of each row
    const float* cosines;  // [rows][pairs]
    const float* sines;
    float scale, q_eps, k_eps;
};
struct Layer {
    void* qkv;  // [rows][heads + 2 kv heads][head_dim]; queries are rotated in place
    void* kv;   // [2][kv heads][slots][head_dim]
    void* out;  // [rows][heads][head_dim]
    const void* q_norm;
    const void* k_norm;
    int64_t window;  // 0: none
};

struct Item {
    int chunk, first_row, num_rows;  // rows counted in the chunk
    int head;                        // kv head
    int first_segment, stop_segment;
    int group;  // of pieces of one item; -1: whole
    int64_t cost;
};
struct Group {
    int left;                       // pieces not yet done
    int first_segment, stop_segment;
    int64_t partial;                // floats before its results
};

constexpr int QUERIES_OF_ITEM = 64;
constexpr int64_t COST_OF_REGION = 1 << 18;  // multiplications that are not worth waking another thread

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Memory {  // kept by each thread, grows
    char* bytes = nullptr;
    size_t size = 0;
    ~Memory() { free(bytes); }
    char* at_least(size_t wanted) {
        if (wanted > size) {
            free(bytes);
            size = up(wanted, 4096);
            bytes = static_cast<char*>(aligned_alloc(64, size));
            if (!bytes) abort();
        }
        return bytes;
    }
};
thread_local Memory own_memory, shared_memory;

// ---- before attention: norm, rotation, writing

template <class T> void load_head(const T* x, int head_dim, float* y) {
    int d = 0;
    for (; d + LANES <= head_dim; d += LANES) store(y + d, load(x + d));
    if (d < head_dim) store(y + d, load(x + d, head_dim - d));
}
template <class T> void store_head(const float* y, int head_dim, T* x) {
    int d = 0;
    for (; d + LANES <= head_dim; d += LANES) store(x + d, load(y + d));
    if (d < head_dim) store(x + d, load(y + d), head_dim - d);
}

// In place; rounded to the model's type, as what follows would see it.
template <class T> void normalise(float* y, const T* weight, int head_dim, float eps) {
    f32x16 squares = zero();
    for (int d = 0; d < head_dim; d += LANES) {
        f32x16 x = load(y + d);  // zeros behind the head
        squares = fma(x, x, squares);
    }
    float factor = 1.0f / std::sqrt(sum(squares) / head_dim + eps);
    for (int d = 0; d < head_dim; d += LANES) {
        f32x16 w = d + LANES <= head_dim ? load(weight + d) : load(weight + d, head_dim - d);
        alignas(64) T rounded[LANES];
        store(rounded, load(y + d) * factor * w);
        store(y + d, load(rounded));
    }
}

void rotate(float* y, const float* cosines, const float* sines, int num_pairs) {
    int i = 0;
    for (; i + LANES <= num_pairs; i += LANES) {
        f32x16 a = load(y + i), b = load(y + num_pairs + i), c = load(cosines + i), s = load(sines + i);
        store(y + i, a * c - b * s);
        store(y + num_pairs + i, b * c + a * s);
    }
    for (; i < num_pairs; ++i) {
        float a = y[i], b = y[num_pairs + i], c = cosines[i], s = sines[i];
        y[i] = a * c - b * s;
        y[num_pairs + i] = b * c + a * s;
    }
}

template <class T> void prepare(const Step& step, const Layer& layer, int64_t row, int64_t head, float* y) {
    int head_dim = step.head_dim, group = step.num_heads / step.num_kv_heads;
    T* x = static_cast<T*>(layer.qkv) + row * (step.num_heads + 2 * step.num_kv_heads) * head_dim;
    const float* cosines = step.cosines + row * step.num_pairs;
    const float* sines = step.sines + row * step.num_pairs;
    T* slot = static_cast<T*>(layer.kv) + (head * step.num_slots + step.slots[row]) * head_dim;
    for (int i = 0; i <= group; ++i) {  // the last is the key
        bool is_key = i == group;
        T* from = x + (is_key ? step.num_heads + head : head * group + i) * head_dim;
        T* to = is_key ? slot : from;
        const void* norm = is_key ? layer.k_norm : layer.q_norm;
        if (!norm && !step.num_pairs) {
            if (is_key) memcpy(to, from, head_dim * sizeof(T));
            continue;
        }
        load_head(from, head_dim, y);
        if (norm) normalise(y, static_cast<const T*>(norm), head_dim, is_key ? step.k_eps : step.q_eps);
        rotate(y, cosines, sines, step.num_pairs);
        store_head(y, head_dim, to);
    }
    const T* value = x + (step.num_heads + step.num_kv_heads + head) * head_dim;
    memcpy(slot + step.num_kv_heads * step.num_slots * head_dim, value, head_dim * sizeof(T));
}

// ---- one item

// Some queries' results of a segment, or of all of them so far: the greatest score, the sum of weights, the outputs.
struct Partial {
    float *greatest, *total, *outputs;
    Partial(float* memory, int num_queries) : greatest(memory), total(memory + up(num_queries, LANES)), outputs(memory + 2 * up(num_queries, LANES)) {}
    static int64_t size(int num_queries, int width) { return 2 * up(num_queries, LANES) + (int64_t)num_queries * width; }
};

struct Shape {  // of an item
    int num_queries, group, num_words, width;  // width: head_dim in whole loads
    Shape(const Step& step, const Item& item, int word, int elements)
        : num_queries(item.num_rows * (step.num_heads / step.num_kv_heads)),
          group(step.num_heads / step.num_kv_heads),
          num_words((step.head_dim + word - 1) / word),
          width(up(step.head_dim, elements)) {}
};

int64_t first_seen(const Layer& layer, int64_t position) { return layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0; }

// Where positions [first, stop) lie, counted from `origin`.
int find_runs(const int64_t* blocks, int64_t block_size, int64_t first, int64_t stop, int64_t origin, Run* runs) {
    int num_runs = 0;
    for (int64_t block = first / block_size; first < stop; ++block) {
        int64_t end = std::min(stop, (block + 1) * block_size);
        int64_t slot = blocks[block] * block_size + first - block * block_size;
        if (num_runs && runs[num_runs - 1].slot + runs[num_runs - 1].count == slot)
            runs[num_runs - 1].count += end - first;
        else
            runs[num_runs++] = Run{(int)(first - origin), (int)(end - first), slot};
        first = end;
    }
    return num_runs;
}

// Walks keys in order of their positions.
template <class T> struct Walk {
    const T* keys;
    const Run* run;
    const Run* last;
    int64_t stride;
    int64_t values_after;  // elements from a key to its value

    // Turn the 16 keys from `position` on; behind the last one, any of them.
    inline __attribute__((always_inline)) void turn_next(int position, int head_dim, uint32_t* turned) {
        while (run < last && run->position + run->count <= position) ++run;
        if (run->position <= position && position + LANES <= run->position + run->count) {
            const T* row = keys + (run->slot + position - run->position) * stride;
            int64_t step = stride;
            // The values of these positions are next.
            for (int i = 0; i < LANES; ++i)
                for (int d = 0; d < head_dim; d += ELEMENTS<T>) fetch(row + values_after + i * step + d);
            turn_keys<T>([=](int i) { return row + i * step; }, head_dim, turned);
            return;
        }
        const T* rows[LANES];
        const Run* at = run;
        for (int i = 0; i < LANES; ++i) {
            while (at < last && at->position + at->count <= position + i) ++at;
            int offset = std::min(std::max(position + i - at->position, 0), at->count - 1);
            rows[i] = keys + (at->slot + offset) * stride;
        }
        turn_keys<T>([&](int i) { return rows[i]; }, head_dim, turned);
    }
};

struct Scratch {
    uint32_t* queries;
    uint32_t* turned;
    float* scores;
    float* values;
    float* segment;
    float* whole;
};

// The positions of a segment that an item's rows see, counted from its origin.
struct Span {
    int64_t origin;
    int first, stop, num_runs;
    Run runs[SEGMENT];

    void find(const Step& step, const Layer& layer, const Item& item, int segment) {
        const Chunk& chunk = step.chunks[item.chunk];
        int64_t position = chunk.start + item.first_row;
        origin = (int64_t)segment * SEGMENT;
        first = std::max(origin, first_seen(layer, position)) - origin;
        stop = std::min<int64_t>(origin + SEGMENT, position + item.num_rows) - origin;
        num_runs = find_runs(step.blocks + chunk.first_block, step.block_size, origin + first, origin + stop, origin, runs);
    }
};

template <class T> const T* keys_of(const Step& step, const Layer& layer, const Item& item) {
    return static_cast<const T*>(layer.kv) + item.head * step.num_slots * step.head_dim;
}

template <class T>
void attend_segment(const Step& step, const Layer& layer, const Item& item, const Shape& shape, const Span& span, Next<T> next, Scratch& scratch, Partial result) {
    int head_dim = step.head_dim, num_queries = shape.num_queries, num_runs = span.num_runs;
    int64_t first_position = step.chunks[item.chunk].start + item.first_row, origin = span.origin;
    const Run* runs = span.runs;
    const T* keys = keys_of<T>(step, layer, item);
    const T* values = keys + step.num_kv_heads * step.num_slots * head_dim;
    int first = span.first, stop = span.stop;

    int v0 = first / LANES, v1 = (stop + LANES - 1) / LANES;
    Walk<T> walk{keys, runs, runs + num_runs - 1, head_dim, values - keys};
    for (int v = v0; v < v1; v += TILE) {
        int num_vectors = std::min(TILE, v1 - v);
        for (int i = 0; i < num_vectors; ++i) walk.turn_next((v + i) * LANES, head_dim, scratch.turned + i * shape.num_words * LANES);
        score_all<T>(scratch.turned, num_vectors, scratch.queries, num_queries, shape.num_words, step.scale, scratch.scores + v * LANES);
    }
    for (int q = 0; q < num_queries; ++q) {
        int64_t position = first_position + q / shape.group;
        int from = std::max(origin, first_seen(layer, position)) - origin;
        int to = std::min<int64_t>(origin + SEGMENT, position + 1) - origin;
        float* scores = scratch.scores + q * SEGMENT;
        if (from < to) {
            softmax(scores, from, to, v0, v1, result.greatest + q, result.total + q);
        } else {
            std::fill(scores + v0 * LANES, scores + v1 * LANES, 0.0f);
            result.greatest[q] = -__builtin_inff();
            result.total[q] = 0;
        }
    }
    std::fill(result.outputs, result.outputs + num_queries * shape.width, 0.0f);
    if (num_queries <= 2 * QUERIES) {
        weigh_all<T>(scratch.scores, num_queries, runs, num_runs, values, head_dim, head_dim, result.outputs, shape.width, next);
        return;
    }
    // For many queries values are widened once, a tile at a time.
    for (int r = 0; r < num_runs; ++r)
        for (int done = 0; done < runs[r].count; done += TILE * LANES) {
            Run run = {runs[r].position + done, std::min(TILE * LANES, runs[r].count - done), 0};
            for (int i = 0; i < run.count; ++i) widen_row(values + (runs[r].slot + done + i) * head_dim, head_dim, scratch.values + i * shape.width);
            weigh_all<float>(scratch.scores, num_queries, &run, 1, scratch.values, shape.width, shape.width, result.outputs, shape.width, {});
        }
}

// Add a segment's results to those of the segments before it.
void merge(Partial whole, Partial segment, const Shape& shape) {
    for (int q = 0; q < shape.num_queries; ++q) {
        if (segment.total[q] == 0) continue;  // the query sees nothing of it
        float* to = whole.outputs + q * shape.width;
        const float* from = segment.outputs + q * shape.width;
        if (whole.total[q] == 0) {
            memcpy(to, from, shape.width * sizeof(float));
            whole.greatest[q] = segment.greatest[q];
            whole.total[q] = segment.total[q];
            continue;
        }
        float greatest = std::max(whole.greatest[q], segment.greatest[q]);
        float a = exp_negative(whole.greatest[q] - greatest), b = exp_negative(segment.greatest[q] - greatest);
        for (int d = 0; d < shape.width; d += LANES) store(to + d, fma(load(from + d), broadcast(b), load(to + d) * a));
        whole.greatest[q] = greatest;
        whole.total[q] = whole.total[q] * a + segment.total[q] * b;
    }
}

template <class T> void finish(const Step& step, const Layer& layer, const Item& item, const Shape& shape, Partial whole) {
    const Chunk& chunk = step.chunks[item.chunk];
    int head_dim = step.head_dim;
    for (int q = 0; q < shape.num_queries; ++q) {
        int64_t row = chunk.first_row + item.first_row + q / shape.group, head = item.head * shape.group + q % shape.group;
        float* y = whole.outputs + q * shape.width;
        for (int d = 0; d < shape.width; d += LANES) store(y + d, load(y + d) / whole.total[q]);
        narrow_row(y, head_dim, static_cast<T*>(layer.out) + (row * step.num_heads + head) * head_dim);
    }
}

template <class T> Scratch lay_out(const Shape& shape) {
    int64_t n = shape.num_queries;
    int64_t sizes[] = {
        up(n * shape.num_words, LANES), (int64_t)TILE * LANES * up(shape.num_words, LANES), n * SEGMENT,
        (int64_t)TILE * LANES * shape.width, Partial::size(n, shape.width), Partial::size(n, shape.width),
    };
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    float* memory = reinterpret_cast<float*>(own_memory.at_least(total * sizeof(float)));
    float* parts[6];
    for (int i = 0; i < 6; ++i) {
        parts[i] = memory;
        memory += sizes[i];
    }
    Scratch scratch;
    scratch.queries = reinterpret_cast<uint32_t*>(parts[0]);
    scratch.turned = reinterpret_cast<uint32_t*>(parts[1]);
    scratch.scores = parts[2];
    scratch.values = parts[3];
    scratch.segment = parts[4];
    scratch.whole = parts[5];
    return scratch;
}

INLINE void pack_query(const bf16* x, int head_dim, uint32_t* words) {
    if (head_dim % 2) words[head_dim / 2] = 0;
    memcpy(words, x, head_dim * sizeof(bf16));
}
template <class T> INLINE void pack_query(const T* x, int head_dim, uint32_t* words) {
    for (int d = 0; d < head_dim; ++d) {
        float value = to_float(x[d]);
        memcpy(words + d, &value, 4);
    }
}

// `following`: what this thread does next, if that is known.
template <class T>
void attend(const Step& step, const Layer& layer, const Item& item, const Item* following, std::vector<Group>& groups, float* partials) {
    const Chunk& chunk = step.chunks[item.chunk];
    Shape shape(step, item, Form<T>::word, ELEMENTS<T>);
    Scratch scratch = lay_out<T>(shape);
    int64_t row_size = (step.num_heads + 2 * step.num_kv_heads) * step.head_dim;
    for (int q = 0; q < shape.num_queries; ++q) {
        int64_t row = chunk.first_row + item.first_row + q / shape.group, head = item.head * shape.group + q % shape.group;
        pack_query(static_cast<const T*>(layer.qkv) + row * row_size + head * step.head_dim, step.head_dim, scratch.queries + q * shape.num_words);
    }
    Partial whole(scratch.whole, shape.num_queries);
    std::fill(whole.total, whole.total + shape.num_queries, 0.0f);
    int64_t size = Partial::size(shape.num_queries, shape.width);
    Group* group = item.group < 0 ? nullptr : &groups[item.group];
    Span spans[2];
    spans[0].find(step, layer, item, item.first_segment);
    for (int s = item.first_segment; s < item.stop_segment; ++s) {
        const Span& span = spans[(s - item.first_segment) % 2];
        Span& ahead = spans[(s - item.first_segment + 1) % 2];
        Next<T> next = {};
        if (s + 1 < item.stop_segment) {
            ahead.find(step, layer, item, s + 1);
            next = {keys_of<T>(step, layer, item), ahead.runs, ahead.num_runs};
        } else if (following) {
            ahead.find(step, layer, *following, following->first_segment);
            next = {keys_of<T>(step, layer, *following), ahead.runs, ahead.num_runs};
        }
        Partial segment(group ? partials + group->partial + (s - group->first_segment) * size : scratch.segment, shape.num_queries);
        attend_segment<T>(step, layer, item, shape, span, next, scratch, segment);
        if (!group) merge(whole, segment, shape);
    }
    if (!group) return finish<T>(step, layer, item, shape, whole);
    if (__atomic_sub_fetch(&group->left, 1, __ATOMIC_ACQ_REL)) return;
    for (int s = group->first_segment; s < group->stop_segment; ++s)
        merge(whole, Partial(partials + group->partial + (s - group->first_segment) * size, shape.num_queries), shape);
    finish<T>(step, layer, item, shape, whole);
}

// ---- all items

// The work of a layer, the longest first; `num_partials` floats are needed for what is cut.
std::vector<Item> plan(const Step& step, const Layer& layer, int num_threads, std::vector<Group>& groups, int64_t& num_partials) {
    int heads_of_group = step.num_heads / step.num_kv_heads;
    int rows_of_item = std::max(1, QUERIES_OF_ITEM / heads_of_group);
    std::vector<Item> whole;
    int64_t total = 0;
    for (int c = 0; c < step.num_chunks; ++c) {
        const Chunk& chunk = step.chunks[c];
        for (int first = 0; first < chunk.num_rows; first += rows_of_item) {
            Item item{c, first, (int)std::min<int64_t>(rows_of_item, chunk.num_rows - first), 0, 0, 0, -1, 0};
            int64_t from = first_seen(layer, chunk.start + first), to = chunk.start + first + item.num_rows;
            item.first_segment = from / SEGMENT;
            item.stop_segment = (to + SEGMENT - 1) / SEGMENT;
            item.cost = (to - from) * (item.num_rows * heads_of_group + 4) * step.head_dim;  // 4: turning a key
            total += item.cost * step.num_kv_heads;
            whole.push_back(item);
        }
    }
    std::sort(whole.begin(), whole.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
    int64_t bound = total / (3 * num_threads);
    std::vector<Item> items;
    items.reserve(whole.size() * step.num_kv_heads);
    num_partials = 0;
    for (Item item : whole) {
        int num_segments = item.stop_segment - item.first_segment;
        int64_t num_pieces = num_threads == 1 ? 1 : std::min<int64_t>(num_segments, (item.cost + bound - 1) / std::max<int64_t>(1, bound));
        for (item.head = 0; item.head < step.num_kv_heads; ++item.head) {
            if (num_pieces <= 1) {
                items.push_back(item);
                continue;
            }
            int num_queries = item.num_rows * heads_of_group;
            Item piece = item;
            piece.group = groups.size();
            groups.push_back(Group{(int)num_pieces, item.first_segment, item.stop_segment, num_partials});
            num_partials += num_segments * Partial::size(num_queries, up(step.head_dim, 2 * LANES));
            for (int p = 0; p < num_pieces; ++p) {
                piece.first_segment = item.first_segment + num_segments * p / num_pieces;
                piece.stop_segment = item.first_segment + num_segments * (p + 1) / num_pieces;
                items.push_back(piece);
            }
        }
    }
    return items;
}

template <class T> void run(const Step& step, const Layer& layer) {
    int64_t work = 0;
    for (int c = 0; c < step.num_chunks; ++c)
        work += step.chunks[c].num_rows * (step.chunks[c].start + step.chunks[c].num_rows) * step.num_heads * step.head_dim;
    int num_threads = work < COST_OF_REGION ? 1 : omp_get_max_threads();
    std::vector<Group> groups;
    int64_t num_partials = 0;
    std::vector<Item> items = plan(step, layer, num_threads, groups, num_partials);
    float* partials = reinterpret_cast<float*>(shared_memory.at_least(num_partials * sizeof(float)));
    int64_t num_items = items.size(), num_heads = step.num_rows * step.num_kv_heads;
    int64_t at_once = std::max<int64_t>(1, num_items / (8 * num_threads));  // then a thread knows what it does next
    int64_t head_bytes = up(step.head_dim, LANES) * sizeof(float);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        float* y = reinterpret_cast<float*>(own_memory.at_least(head_bytes));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_heads; ++i) prepare<T>(step, layer, i / step.num_kv_heads, i % step.num_kv_heads, y);
#pragma omp for schedule(dynamic, at_once) nowait
        for (int64_t i = 0; i < num_items; ++i) {
            bool known = (i + 1) % at_once && i + 1 < num_items;
            attend<T>(step, layer, items[i], known ? &items[i + 1] : nullptr, groups, partials);
        }
    }
}

}  // namespace

extern "C" void tllm_attend(const Step* step, void* qkv, void* kv, void* out, const void* q_norm, const void* k_norm, float q_eps, float k_eps, int64_t window) {
    Layer layer{qkv, kv, out, q_norm, k_norm, window};
    Step own = *step;
    own.q_eps = q_eps;
    own.k_eps = k_eps;
    switch (step->dtype) {
        case 0: return run<float>(own, layer);
        case 1: return run<bf16>(own, layer);
        default: return run<f16>(own, layer);
    }
}
