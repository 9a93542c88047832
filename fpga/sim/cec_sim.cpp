// The kernel in simulation, as a library: one call of the host is one run of the hardware model, with an AXI memory
// whose latency, rate, stalls and errors are set, and which checks the kernel's side of the protocol.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>

#include "Vcec_kernel.h"
#include "Vcec_kernel___024root.h"
#include "verilated.h"

struct Options {
    uint32_t latency;        // cycles from an address to its first data, and from data to the response
    uint32_t jitter;         // more cycles, at random up to this
    uint32_t rate;           // bytes a cycle that the memory gives, times 256
    uint32_t stall;          // chance of not being ready or valid in a cycle, of 256; each channel by itself
    uint32_t seed;           // also decides in which order the memory takes a write's address and data
    uint32_t max_cycles;     // after which a run counts as hung
    uint64_t bad_read, bad_write;  // addresses whose burst gets an error
};

struct Result {
    uint32_t status;         // the status register, or 0xffffffff for a run that hung
    uint32_t violations;     // of the AXI protocol, by the kernel
    uint64_t cycles;         // from start to interrupt
    uint64_t read_bytes, written_bytes;
    uint64_t read_waits;     // cycles in which the kernel wanted data and the memory had none
    uint64_t kernel_waits;   // cycles in which the memory had data and the kernel did not take it
};

namespace {
constexpr int STATES = 8, MACHINES = 4;

struct Burst {
    uint64_t address, ready;
    uint32_t left;
    bool bad;
};

VerilatedContext* unknown() {  // registers and memories start at random, as those of a chip may
    auto* context = new VerilatedContext;
    context->randReset(2);
    context->randSeed(1);
    return context;
}

struct Sim {
    std::unique_ptr<VerilatedContext> context{unknown()};
    std::unique_ptr<Vcec_kernel> top{new Vcec_kernel{context.get()}};
    std::map<uint64_t, std::pair<uint8_t*, uint64_t>> memory;  // address -> bytes
    Options options{60, 0, 64 * 256, 0, 1, 100000000, ~0ull, ~0ull};
    std::mt19937 random{1};
    std::deque<Burst> reads, writes;
    std::deque<std::array<uint8_t, LANES>> beats;  // written data, whose address may still come
    std::deque<bool> lasts;
    std::deque<std::pair<uint64_t, bool>> responses;
    uint64_t now = 0;
    int64_t credit = 0;
    Result result{};
    uint32_t visits[MACHINES][STATES][STATES] = {};
    uint32_t last[MACHINES] = {};
    std::string fault;

    bool chance() { return options.stall && (random() & 255) < options.stall; }
    uint32_t late() { return options.latency + (options.jitter ? random() % options.jitter : 0); }

    uint8_t* at(uint64_t address, uint64_t bytes) {
        auto it = memory.upper_bound(address);
        if (it == memory.begin()) return nullptr;
        --it;
        return address - it->first + bytes <= it->second.second ? it->second.first + (address - it->first) : nullptr;
    }

    void complain(const char* text) {
        if (!result.violations++) fault = text;
    }

    void check(uint64_t address, uint32_t length, uint32_t size) {
        if (address % LANES) complain("address not aligned");
        if ((1u << size) != LANES) complain("size is not the port's");
        if (address / 4096 != (address + (length + 1ull) * LANES - 1) / 4096) complain("burst crosses 4 KiB");
    }

    // The memory's side before a clock edge: what it offers in this cycle.
    bool r_held = false, b_held = false;
    void offer() {
        top->m_axi_gmem_arready = reads.size() < 16 && !chance();
        // A write's data after its address; the address only beside its data; data at any time: AXI allows all three.
        enum { ADDRESS_FIRST, ADDRESS_WITH_DATA, ANY };
        uint32_t order = options.seed % 3;
        bool data = order != ADDRESS_WITH_DATA || top->m_axi_gmem_wvalid || !beats.empty();
        top->m_axi_gmem_awready = writes.size() < 8 && data && !chance();
        top->m_axi_gmem_wready = (order == ADDRESS_FIRST ? !writes.empty() : beats.size() < 32) && !chance();
        if (credit < int64_t(LANES) * 256) credit += options.rate;
        if (!r_held) {
            bool have = !reads.empty() && reads.front().ready <= now && credit >= int64_t(LANES) * 256 && !chance();
            top->m_axi_gmem_rvalid = have;
            if (have) {
                auto& burst = reads.front();
                uint8_t* from = at(burst.address, LANES);
                if (from) memcpy(&top->m_axi_gmem_rdata, from, LANES);
                else memset(&top->m_axi_gmem_rdata, 0xa5, LANES);
                top->m_axi_gmem_rresp = !from ? 3 : burst.bad ? 2 : 0;
                top->m_axi_gmem_rlast = burst.left == 1;
            }
        }
        if (!b_held) {
            top->m_axi_gmem_bvalid = !responses.empty() && responses.front().first <= now && !chance();
            top->m_axi_gmem_bresp = !responses.empty() && responses.front().second ? 2 : 0;
        }
    }

    struct Seen { bool valid = false; uint64_t a = 0; uint32_t b = 0; uint8_t data[64] = {}; } ar, aw, w;
    void stable(Seen& seen, bool valid, bool ready, uint64_t a, uint32_t b, const void* data) {
        if (seen.valid && (!valid || seen.a != a || seen.b != b || (data && memcmp(seen.data, data, LANES))))
            complain("a channel changed while it waited");
        seen.valid = valid && !ready;
        seen.a = a;
        seen.b = b;
        if (data) memcpy(seen.data, data, LANES);
    }

    // One clock cycle.
    void cycle() {
        offer();
        top->eval();
        auto& t = *top;
        stable(ar, t.m_axi_gmem_arvalid, t.m_axi_gmem_arready, t.m_axi_gmem_araddr, t.m_axi_gmem_arlen, nullptr);
        stable(aw, t.m_axi_gmem_awvalid, t.m_axi_gmem_awready, t.m_axi_gmem_awaddr, t.m_axi_gmem_awlen, nullptr);
        stable(w, t.m_axi_gmem_wvalid, t.m_axi_gmem_wready, 0, t.m_axi_gmem_wlast, &t.m_axi_gmem_wdata);
        if (t.m_axi_gmem_arvalid && t.m_axi_gmem_arready) {
            check(t.m_axi_gmem_araddr, t.m_axi_gmem_arlen, t.m_axi_gmem_arsize);
            uint64_t end = t.m_axi_gmem_araddr + (t.m_axi_gmem_arlen + 1ull) * LANES;
            bool bad = t.m_axi_gmem_araddr <= options.bad_read && options.bad_read < end;
            reads.push_back({t.m_axi_gmem_araddr, now + late(), t.m_axi_gmem_arlen + 1u, bad});
        }
        r_held = t.m_axi_gmem_rvalid && !t.m_axi_gmem_rready;
        if (t.m_axi_gmem_rvalid && t.m_axi_gmem_rready) {
            credit -= int64_t(LANES) * 256;
            result.read_bytes += LANES;
            reads.front().address += LANES;
            if (!--reads.front().left) reads.pop_front();
        }
        result.read_waits += t.m_axi_gmem_rready && !t.m_axi_gmem_rvalid;
        result.kernel_waits += r_held;
        if (t.m_axi_gmem_wvalid && t.m_axi_gmem_wready) {
            lasts.push_back(t.m_axi_gmem_wlast);
            memcpy(beats.emplace_back().data(), &t.m_axi_gmem_wdata, LANES);
            result.written_bytes += LANES;
        }
        if (t.m_axi_gmem_awvalid && t.m_axi_gmem_awready) {
            check(t.m_axi_gmem_awaddr, t.m_axi_gmem_awlen, t.m_axi_gmem_awsize);
            uint64_t end = t.m_axi_gmem_awaddr + (t.m_axi_gmem_awlen + 1ull) * LANES;
            bool bad = t.m_axi_gmem_awaddr <= options.bad_write && options.bad_write < end;
            writes.push_back({t.m_axi_gmem_awaddr, 0, t.m_axi_gmem_awlen + 1u, bad});
        }
        while (!beats.empty() && !writes.empty()) {
            auto& burst = writes.front();
            if (lasts.front() != (burst.left == 1)) complain("wlast in the wrong place");
            uint8_t* to = at(burst.address, LANES);
            if (to && !burst.bad) memcpy(to, beats.front().data(), LANES);
            burst.bad |= !to;
            burst.address += LANES;
            if (!--burst.left) {
                responses.push_back({now + late(), burst.bad});
                writes.pop_front();
            }
            beats.pop_front();
            lasts.pop_front();
        }
        b_held = t.m_axi_gmem_bvalid && !t.m_axi_gmem_bready;
        if (t.m_axi_gmem_bvalid && t.m_axi_gmem_bready) responses.pop_front();
        auto& root = *t.rootp;
        uint32_t states[MACHINES] = {root.cec_kernel__DOT__state, root.cec_kernel__DOT__reader__DOT__state,
                                     root.cec_kernel__DOT__topk__DOT__state, root.cec_kernel__DOT__writer__DOT__state};
        for (int i = 0; i < MACHINES; i++) {
            if (t.ap_rst_n) visits[i][last[i] % STATES][states[i] % STATES]++;
            last[i] = states[i];
        }
        t.ap_clk = 1;
        t.eval();
        t.ap_clk = 0;
        now++;
    }

    void write_register(uint32_t address, uint32_t value) {
        auto& t = *top;
        t.s_axi_control_awaddr = address;
        t.s_axi_control_wdata = value;
        t.s_axi_control_wstrb = 15;
        t.s_axi_control_awvalid = t.s_axi_control_wvalid = 1;
        bool taken = false;
        while (!taken) {
            t.eval();
            taken = t.s_axi_control_awready;
            cycle();
        }
        t.s_axi_control_awvalid = t.s_axi_control_wvalid = 0;
        t.s_axi_control_bready = 1;
        while (!t.s_axi_control_bvalid) cycle();
        cycle();
        t.s_axi_control_bready = 0;
    }

    uint32_t read_register(uint32_t address) {
        auto& t = *top;
        t.s_axi_control_araddr = address;
        t.s_axi_control_arvalid = 1;
        cycle();
        t.s_axi_control_arvalid = 0;
        t.s_axi_control_rready = 1;
        while (!t.s_axi_control_rvalid) cycle();
        uint32_t value = t.s_axi_control_rdata;
        cycle();
        t.s_axi_control_rready = 0;
        return value;
    }

    void reset() {
        auto& t = *top;
        t.ap_rst_n = t.ap_clk = 0;
        t.s_axi_control_awvalid = t.s_axi_control_wvalid = t.s_axi_control_bready = 0;
        t.s_axi_control_arvalid = t.s_axi_control_rready = t.m_axi_gmem_rvalid = t.m_axi_gmem_bvalid = 0;
        for (int i = 0; i < 20; i++) cycle();
        reads.clear();  // also of what the kernel seemed to say before the reset reached it
        writes.clear();
        beats.clear();
        lasts.clear();
        responses.clear();
        r_held = b_held = ar.valid = aw.valid = w.valid = false;
        t.ap_rst_n = 1;
        cycle();
        write_register(0x04, 1);
        write_register(0x08, 1);
    }
};
}  // namespace

extern "C" {
Sim* cec_open() {
    auto* sim = new Sim;
    sim->reset();
    return sim;
}
void cec_close(Sim* sim) { delete sim; }
void cec_reset(Sim* sim) { sim->reset(); }
void cec_options(Sim* sim, const Options* options) {
    sim->options = *options;
    sim->random.seed(options->seed);
}
void cec_map(Sim* sim, uint64_t address, uint8_t* bytes, uint64_t size) { sim->memory[address] = {bytes, size}; }
void cec_unmap(Sim* sim, uint64_t address) { sim->memory.erase(address); }

// words: the registers of the 13 argument words. Runs to the interrupt.
void cec_run(Sim* sim, const uint32_t* words, Result* result) {
    static const uint32_t places[13] = {0x10, 0x14, 0x1c, 0x20, 0x28, 0x2c, 0x34, 0x3c, 0x44, 0x4c, 0x54, 0x5c, 0x64};
    for (int i = 0; i < 13; i++) sim->write_register(places[i], words[i]);
    sim->result = {};
    sim->write_register(0x00, 1);
    uint64_t begin = sim->now;
    while (!sim->top->__SYM__interrupt && sim->now - begin < sim->options.max_cycles) sim->cycle();
    sim->result.cycles = sim->now - begin;
    bool over = sim->top->__SYM__interrupt;
    sim->write_register(0x0c, 1);
    uint32_t control = sim->read_register(0x00);
    if (over && !(control & 2)) sim->complain("interrupt without done");
    if (over && (sim->read_register(0x00) & 6) != 4) sim->complain("done not cleared by reading, or not idle");
    sim->result.status = over ? sim->read_register(0x6c) : 0xffffffff;
    *result = sim->result;
    if (!over) sim->reset();
}
const char* cec_fault(Sim* sim) { return sim->fault.c_str(); }
// Transitions [machine][from][to] since opening.
void cec_visits(Sim* sim, uint32_t* out) { memcpy(out, sim->visits, sizeof sim->visits); }
uint32_t cec_auto_restart(Sim* sim, uint32_t runs) {  // lets the kernel start itself again; returns the runs seen
    sim->write_register(0x00, 0x81);
    uint32_t seen = 0;
    for (uint64_t until = sim->now + sim->options.max_cycles; seen < runs && sim->now < until;) {
        if (sim->top->__SYM__interrupt) {
            sim->write_register(0x0c, 1);
            if (++seen == runs - 1) sim->write_register(0x00, 0x00);
        }
        sim->cycle();
    }
    return seen;
}
}
