// AXI4 read master: for each head its query, then its keys, in bursts that end at 4 KiB, addresses as far ahead as
// the memory takes them. Data comes back in that order and goes to the dot engine. A read error is reported and does
// not stop the run.
module cec_read #(
    parameter LANES = 64,
    parameter KW = 8,
    parameter QBEATS = 8,       // beats of a head's query
    parameter BEATB = 20,       // bits of a head's number of key beats
    parameter DRAIN = 64        // cycles until the dot engine and the score memory are done with a head
) (
    input  wire               clk,
    input  wire               rst,
    input  wire               start,
    input  wire [15:0]        heads,
    input  wire [63:0]        keys,
    input  wire [63:0]        query,
    input  wire [31:0]        key_stride,
    input  wire [BEATB-1:0]   key_beats,  // of a head, above 0
    input  wire               room,       // for the scores of another head
    output reg                claim,
    output reg                q_valid,
    output reg                k_valid,
    output reg  [LANES*8-1:0] data,
    output reg                bad_response,
    output reg                bad_query,  // INT8: a code of -128, whose products could spill into the other head's

    output reg                arvalid,
    input  wire               arready,
    output wire [63:0]        araddr,
    output wire [7:0]         arlen,
    input  wire               rvalid,
    output wire               rready,
    input  wire [LANES*8-1:0] rdata,
    input  wire [1:0]         rresp
);
    localparam LB = $clog2(LANES);
    localparam PAGE = 12 - LB;            // log2 of the beats in 4 KiB

    // ---- addresses
    reg [63-LB:0] at, head_at, query_at;  // in beats
    reg [BEATB-1:0] togo;                 // beats of this query or these keys without an address yet
    reg [15:0] asks;                      // heads whose query has no address yet
    reg asking_keys, sized;
    reg [7:0] len;
    wire [PAGE:0] to_page = (1 << PAGE) - {1'b0, at[PAGE-1:0]};
    wire [PAGE:0] longest = PAGE > 6 && to_page > 64 ? 64 : to_page;
    assign araddr = {at, {LB{1'b0}}};
    assign arlen = len;
    wire busy = asks != 0 || !asking_keys || togo != 0;
    always @(posedge clk) begin
        if (arvalid) begin
            if (arready) begin
                arvalid <= 0;
                sized <= 0;
                at <= at + len + 1'b1;
                togo <= togo - len - 1'b1;
            end
        end else if (busy) begin
            if (togo == 0) begin
                asking_keys <= ~asking_keys;
                at <= asking_keys ? query_at : head_at;
                togo <= asking_keys ? QBEATS : key_beats;
                if (asking_keys) begin
                    query_at <= query_at + QBEATS;
                    asks <= asks - 1'b1;
                end else head_at <= head_at + key_stride[31:LB];
            end else if (!sized) begin
                len <= (togo < longest ? togo : longest) - 1'b1;
                sized <= 1;
            end else arvalid <= 1;
        end
        if (start) begin
            query_at <= query[63:LB];
            head_at <= keys[63:LB];
            asks <= heads;
            sized <= 0;
        end
        if (rst) begin
            arvalid <= 0;
            asks <= 0;
            asking_keys <= 1;
            togo <= 0;
        end
    end

    // ---- data
    localparam IDLE = 0, QUERY = 1, WAIT = 2, KEYS = 3, DRAINING = 4;
    reg [2:0] state /*verilator public_flat_rd*/;
    reg [15:0] left;
    reg [BEATB-1:0] beats;
    reg [6:0] drain;
    integer i;
    reg low_code;
    always @* begin
        low_code = 0;
        for (i = 0; i < LANES; i = i + 1) low_code = low_code | (data[i*8 +: 8] == 8'h80);
    end
    assign rready = state == QUERY || state == KEYS;
    always @(posedge clk) begin
        claim <= 0;
        q_valid <= rvalid && state == QUERY;
        k_valid <= rvalid && state == KEYS;
        data <= rdata;
        bad_response <= rvalid && rready && rresp[1];
        bad_query <= KW == 8 && q_valid && low_code;
        if (rvalid && rready) beats <= beats - 1'b1;
        case (state)
            IDLE: if (start) begin
                left <= heads;
                beats <= QBEATS;
                state <= QUERY;
            end
            QUERY: if (rvalid && beats == 1) state <= WAIT;
            WAIT: if (room && !claim) begin
                claim <= 1;
                beats <= key_beats;
                state <= KEYS;
            end
            KEYS: if (rvalid && beats == 1) begin
                left <= left - 1'b1;
                drain <= DRAIN;
                state <= DRAINING;
            end
            DRAINING: begin
                drain <= drain - 1'b1;
                beats <= QBEATS;
                if (drain == 0) state <= left == 0 ? IDLE : QUERY;
            end
            default: state <= IDLE;
        endcase
        if (rst) begin
            state <= IDLE;
            q_valid <= 0;
            k_valid <= 0;
        end
    end
endmodule
