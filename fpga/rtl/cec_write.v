// Packs a head's answer into beats and writes it: data from byte 64 of the head's region on, in bursts of up to 16
// beats that end at 4 KiB; then, after all responses, the header. So a header in memory vouches for what follows it.
// Data does not wait for its address to be taken: AXI lets a memory wait for both.
//   header  u32 entries, i32 threshold, u32 status, u32 cycles; the rest of its beat means nothing
//   data    u32 positions, or with `pairs` u32 position and i32 score
module cec_write #(
    parameter LANES = 64
) (
    input  wire               clk,
    input  wire               rst,
    input  wire               start,
    input  wire [63:0]        out,
    input  wire [31:0]        out_stride,
    input  wire               pairs,
    input  wire               e_valid,
    output wire               e_ready,
    input  wire [31:0]        e_position,
    input  wire [31:0]        e_score,
    input  wire               finish,     // the head's last entry was given
    output reg                finished,
    input  wire [31:0]        threshold,
    input  wire [31:0]        status,
    input  wire [31:0]        cycles,
    output reg                bad_response,

    output reg                awvalid,
    input  wire               awready,
    output wire [63:0]        awaddr,
    output reg  [7:0]         awlen,
    output wire               wvalid,
    input  wire               wready,
    output wire [LANES*8-1:0] wdata,
    output wire               wlast,
    input  wire               bvalid,
    input  wire [1:0]         bresp
);
    localparam LB = $clog2(LANES);
    localparam PAGE = 12 - LB;
    localparam SLOTS = LANES / 8;         // entries of 64 bits in a beat

    // ---- packing: entries are shifted in from the top
    reg [LANES*8-1:0] beat;
    reg [3:0] slots;
    reg [31:0] half, entries;
    reg has_half, push;
    wire [5:0] count;
    wire fits = count < 28;
    wire flush = finish && (has_half || slots != 0);
    wire enter = (e_valid && e_ready && (pairs || has_half)) || (flush && fits);
    wire [63:0] entry = flush ? {32'd0, has_half ? half : 32'd0} : pairs ? {e_score, e_position} : {e_position, half};
    assign e_ready = fits;
    always @(posedge clk) begin
        push <= enter && slots == SLOTS - 1;
        if (enter) begin
            beat <= {entry, beat[LANES*8-1:64]};
            slots <= slots == SLOTS - 1 ? 0 : slots + 1'b1;
            has_half <= 0;
        end
        if (e_valid && e_ready) begin
            entries <= entries + 1'b1;
            if (!pairs && !has_half) begin
                half <= e_position;
                has_half <= 1;
            end
        end
        if (rst | start | finished) begin
            slots <= 0;
            has_half <= 0;
            entries <= 0;
        end
        if (rst | start) push <= 0;
    end

    wire pop;
    wire [LANES*8-1:0] fifo_data;
    cec_fifo #(.WIDTH(LANES*8), .LOG2(5)) fifo (
        .clk(clk), .rst(rst), .push(push), .din(beat), .pop(pop), .dout(fifo_data), .count(count));

    // ---- writing
    localparam IDLE = 0, SIZE = 1, DATA = 2, ADDRESS = 3, HEADER = 4, HEADER_DATA = 5, RESPONSE = 6, NEXT = 7;
    reg [2:0] state /*verilator public_flat_rd*/;
    reg [63-LB:0] at, head_at;            // in beats
    reg [4:0] left;
    reg [15:0] awaited;                   // responses
    wire [PAGE:0] to_page = (1 << PAGE) - {1'b0, at[PAGE-1:0]};
    wire [5:0] have = count > 16 ? 6'd16 : count;
    wire [4:0] burst = (have < to_page ? have : to_page) - 1'b1;
    wire complete = finish && !flush && !push;  // nothing more comes
    assign awaddr = {at, {LB{1'b0}}};
    assign wvalid = state == DATA || state == HEADER_DATA;
    assign wlast = state == HEADER_DATA || left == 0;
    reg [127:0] header;                   // kept: data must not change while it waits
    assign wdata[127:0] = state == HEADER_DATA ? header : fifo_data[127:0];
    generate if (LANES > 16) assign wdata[LANES*8-1:128] = fifo_data[LANES*8-1:128]; endgenerate
    assign pop = state == DATA && wready;
    wire addressed = awvalid && awready;
    always @(posedge clk) begin
        finished <= 0;
        bad_response <= bvalid && bresp[1];
        awaited <= awaited + addressed - bvalid;
        if (addressed) awvalid <= 0;
        case (state)
            IDLE: if (count >= 16 || (complete && count != 0)) state <= SIZE;
                else if (complete && awaited == 0 && !finished) begin
                    at <= head_at;
                    awlen <= 0;
                    state <= HEADER;
                end
            SIZE: begin
                awlen <= burst;
                left <= burst;
                awvalid <= 1;
                state <= DATA;
            end
            DATA: if (wready) begin
                left <= left - 1'b1;
                if (left == 0) state <= ADDRESS;
            end
            ADDRESS: if (!awvalid) begin
                at <= at + awlen + 1'b1;
                state <= IDLE;
            end
            HEADER: begin
                awvalid <= 1;
                header <= {cycles, status, threshold, entries};
                state <= HEADER_DATA;
            end
            HEADER_DATA: if (wready) state <= RESPONSE;
            RESPONSE: if (!awvalid && awaited == 0) begin
                finished <= 1;
                head_at <= head_at + out_stride[31:LB];
                state <= NEXT;
            end
            NEXT: begin
                at <= head_at + 64/LANES;
                state <= IDLE;
            end
        endcase
        if (start) begin
            head_at <= out[63:LB];
            state <= NEXT;
        end
        if (rst) begin
            state <= IDLE;
            awvalid <= 0;
            awaited <= 0;
            finished <= 0;
        end
    end
endmodule
