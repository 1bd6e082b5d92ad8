#include "copy_plan.h"

#include <algorithm>
#include <string>

#include "copy_common.h"
#include "dispatch.h"
#include "gatherer.h"

namespace everstep {

CopyPlan::CopyPlan(std::span<const Piece> pieces, int64_t data_bytes, int64_t block_bytes)
    : pieces_(std::ssize(pieces)), data_bytes_(data_bytes), block_bytes_(block_bytes) {
    require_block_bytes(block_bytes);
    if (data_bytes < 0) refuse("data_bytes is " + std::to_string(data_bytes) + "; expected >= 0");
    int64_t position = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const Piece& piece = pieces[i];
        const std::string name = "fragment " + std::to_string(i);
        int64_t bytes = 0;
        ByteRange reach{};
        try {
            bytes = checked_box_bytes(piece.shape, piece.item_bytes);
            reach = checked_reach("the source", piece.strides_bytes, piece.shape, piece.item_bytes);
        } catch (const std::invalid_argument& error) {
            refuse(name + ": " + error.what());
        }
        if (piece.start != position) {
            refuse(name + " starts at byte " + std::to_string(piece.start) +
                   " of the data; expected " + std::to_string(position) +
                   ", where the one before it ends");
        }
        if (bytes > data_bytes - position) {
            refuse(name + " of " + std::to_string(bytes) + " bytes at byte " +
                   std::to_string(position) + " does not fit into data of " +
                   std::to_string(data_bytes) + " bytes");
        }
        position += bytes;
        if (bytes == 0) continue;
        const std::vector<int64_t> dense = contiguous_strides(piece.shape, piece.item_bytes);
        sources_.push_back({piece.start, i, reach,
                            make_box_pair(dense, piece.strides_bytes, piece.shape, piece.item_bytes,
                                          Order::kShape)});
    }
    if (position != data_bytes) {
        refuse("the fragments have " + std::to_string(position) + " bytes, but data_bytes is " +
               std::to_string(data_bytes));
    }
}

int64_t CopyPlan::bytes_of(int64_t block) const {
    return std::min(block_bytes_, data_bytes_ - block * block_bytes_);
}

void CopyPlan::check_addresses(std::span<const uint64_t> addresses,
                               std::span<const uint8_t> area) const {
    if (std::ssize(addresses) != pieces_) {
        refuse("there are " + std::to_string(addresses.size()) + " addresses for " +
               std::to_string(pieces_) + " fragments");
    }
    if (length(area) != data_bytes_) {
        refuse("dst has " + std::to_string(area.size()) + " bytes; expected " +
               std::to_string(data_bytes_) + ", as the plan has");
    }
    const auto area_begin = reinterpret_cast<uintptr_t>(area.data());
    for (const Source& source : sources_) {
        const std::string name = "fragment " + std::to_string(source.piece);
        const uint64_t address = addresses[source.piece];
        uint64_t begin = 0;
        uint64_t end = 0;
        if (address == 0 || __builtin_add_overflow(address, source.reach.begin, &begin) ||
            __builtin_add_overflow(address, source.reach.end, &end)) {
            refuse(name + " cannot be at address " + std::to_string(address) + ": it has bytes " +
                   std::to_string(source.reach.begin) + " to " + std::to_string(source.reach.end) +
                   " from there");
        }
        if (begin < area_begin + area.size() && area_begin < end) {
            refuse(name + " and dst overlap in memory");
        }
    }
}

uint32_t CopyPlan::copy_block(int64_t block, std::span<const uint64_t> addresses,
                              uint8_t* area) const {
    int64_t at = block * block_bytes_;
    const int64_t end = at + bytes_of(block);
    auto source = std::upper_bound(
        sources_.begin(), sources_.end(), at,
        [](int64_t byte, const Source& candidate) { return byte < candidate.start; });
    --source;  // sources_ begin with byte 0
    uint32_t crc = 0;
    for (; at < end; ++source) {
        const auto* first = reinterpret_cast<const uint8_t*>(addresses[source->piece]);
        const int64_t begin = at - source->start;
        const int64_t bytes = std::min(end - at, source->box.total_bytes - begin);
        Gatherer gatherer(area, source->start, first, source->box, begin,
                          streams(source->box.total_bytes));
        crc = gatherer.extend(crc, bytes);
        gatherer.finish();
        at += bytes;
    }
    return crc;
}

}  // namespace everstep
