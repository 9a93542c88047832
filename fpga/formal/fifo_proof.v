// cec_fifo against a queue in one register: the same count always, and the same next item.
module fifo_proof (
    input wire       clk,
    input wire       rst,
    input wire       push,
    input wire       pop,
    input wire       din
);
    wire dout;
    wire [2:0] count;
    cec_fifo #(.WIDTH(1), .LOG2(2)) dut (
        .clk(clk), .rst(rst), .push(push), .din(din), .pop(pop), .dout(dout), .count(count));

    reg [3:0] items;
    reg [2:0] n;
    reg started = 0;
    wire do_push = push && n < 4;
    wire do_pop = pop && n > 0;
    wire [2:0] kept = n - do_pop;
    wire [3:0] rest = do_pop ? items >> 1 : items;
    always @(posedge clk) begin
        started <= 1;
        if (!started) assume (rst);
        n <= rst ? 0 : kept + do_push;
        items <= do_push ? (rest & ~(4'd1 << kept)) | ({3'd0, din} << kept) : rest;
        if (started) begin
            assert (count == n && n <= 4);
            if (n != 0) assert (dout == items[0]);
            cover (n == 4 && push && pop);
        end
    end
endmodule
